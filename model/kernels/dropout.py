"""Dropout on a CPU: decisions drawn four at a time and applied by whole-number arithmetic, and drawn again backwards.

PyTorch draws one number a decision there, which takes five times as long, and keeps a mask for the backward. On other
devices PyTorch's own dropout runs.

The rate is rounded to a multiple of 1/65536. Invariant: the decisions depend on one draw from PyTorch's global CPU
generator alone.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Decisions:
    """The same stream of keep-or-drop decisions from one seed; `rate` is the fraction that is kept.

    16 random bits a decision: four decisions from one draw.
    """

    def __init__(self, dropout: float, seed: int, dtype: torch.dtype) -> None:
        self._threshold = round(dropout * 65536)
        self._dtype = dtype
        self._bits = np.random.SFC64(seed)  # three times as fast as torch's generator
        self.rate = 1 - self._threshold / 65536

    def draw(self, shape: torch.Size) -> Tensor | None:
        """For `apply_`: 1 keeps and 0 drops; None where nothing is dropped."""
        if not self._threshold:
            return None
        count = shape.numel()
        bits = self._bits.random_raw(-(-count // 4)).view(np.int16)
        kept = torch.from_numpy(bits)[:count].view(shape)
        kept.ge_(self._threshold - 32768)  # in place: a tensor of booleans takes five times as long
        return kept if self._dtype == torch.bfloat16 else kept.to(self._dtype)

    def apply_(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """`x` with zeros where `kept` (from `draw`) says drop, in place."""
        if kept is None:
            return x
        if kept.dtype == torch.int16:  # a product of bit patterns, with one or zero
            x.view(torch.int16).mul_(kept)
            return x
        return x.mul_(kept)


class Dropout(nn.Dropout):
    """nn.Dropout that on a CPU draws its decisions by `Decisions`, and keeps nothing but their seed."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu" or input.dtype not in DTYPES:
            return super().forward(input)
        return drop(input, self.p)


def install(model: nn.Module) -> None:
    """Let every nn.Dropout inside `model` be a `Dropout`."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                own = Dropout(child.p)
                setattr(parent, name, own.train(child.training))


@torch.compiler.disable  # makes a generator: nothing to gain for a compiler
def drop(x: Tensor, dropout: float) -> Tensor:
    """x [...] with the fraction `dropout` of its elements zero and the others divided by what is left."""
    output: Tensor = _Drop.apply(x, dropout, draw_seed())
    return output


def draw_seed() -> int:
    """One draw of PyTorch's global CPU generator."""
    return int(torch.randint(1 << 62, ()))  # a CPU tensor: no device waits


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        return _dropped(x, dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(upstream, ctx.dropout, ctx.seed), None, None


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    decisions = Decisions(dropout, seed, x.dtype)
    return decisions.apply_(x.contiguous() / decisions.rate, decisions.draw(x.shape))
