"""One cast under autocast for all products that take the same hidden states: queries, keys and values.

Autocast casts the input of each product anew, and each copy is kept for the backward. Here they keep one, with the
same gradients to the last bit.

Leaves out: forwards without gradients, which keep no copies.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SharedCast:
    """A forward pre-hook of linear layers: casts the input as autocast would, once as long as the copy is alive."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def __call__(self, _linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = arguments
        kind = x.device.type
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return None  # a compiler finds what casts have in common itself
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if not autocast or x.dtype != torch.float32:
            return None
        dtype = torch.get_autocast_dtype(kind)
        copy = None
        if self._last is not None:
            given, version, made = self._last
            if given() is x and version == x._version:
                copy = made()
        if copy is None or copy.dtype != dtype:
            copy = x.detach().to(dtype)
        cast = _Cast.apply(x, copy)
        self._last = weakref.ref(x), x._version, weakref.ref(cast)
        return cast, *others


class _Cast(torch.autograd.Function):
    """A cast of `x` whose numbers lie in `copy`: what comes back is added up in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.to(ctx.dtype), None


def install(model: nn.Module) -> None:
    """Let the linear layers inside `model` share the casts of their inputs."""
    share = SharedCast()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(share)
