"""Gradients and loss terms of micro-batches → their sums over the step, exact or fast.

Floating-point sums depend on who adds what first, so a run with two workers is not the run with one. `ExactSum`
adds each micro-batch as 64-bit integers: integer addition is associative, so any number of workers and any order
give the same bits. `FastSum` is an ordinary float32 sum: a third of the memory, and equal but for rounding.

Both keep one flat float32 `gradient` that backward passes write into, and are summed over the workers as one tensor
(gradient, loss terms, and for `ExactSum` the number of micro-batches that were out of its range). Nothing here waits
for the device.

The numbers of `ExactSum`: gradients in units of 2^-40, loss terms in units of 2^-30. A micro-batch may add values up
to 2^61 units divided by the number of micro-batches (rounded down to a power of two), so that the sum can't overflow:
with 8 micro-batches a gradient element up to 2^18 each. A greater value, an infinity or a NaN is counted and never
silently wrapped. Multiplying a float32 by 2^40 and rounding it to an integer loses only bits below 2^-41. One rounding
to float32 follows, at the end.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from minilm.orchestrator.train.distributed import World

GRADIENT_UNIT = 2.0**-40
TERM_UNIT = 2.0**-30
CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 24  # elements converted at once; a CPU's cache holds its chunk


class GradientSum(Protocol):
    """The protocol of a step: `begin`, then backward and `add` for each micro-batch, then `finish`.

    gradient: float32 [size]; parameters' `.grad` are views into it. After `finish` it is the mean gradient.
    """

    gradient: Tensor

    def begin(self) -> None:
        """Start at zero: after another step, or after an attempt at this one that ran out of memory."""

    def add(self, terms: Tensor) -> None:
        """Add a micro-batch whose backward pass has just run; terms: its undivided sums [num_terms]."""

    def finish(self, world: World, count: float) -> tuple[Tensor, Tensor]:
        """Sum over the workers and divide by `count`.

        Returns the means of the terms, float64 [num_terms], and a bool scalar: whether every number was finite (and,
        for `ExactSum`, within range; otherwise the terms' means and the gradient's norm are NaN). Both stay on the
        device and are the same on all ranks.
        """


class FastSum:
    """A float32 sum, whose last bits depend on the order and on the number of workers."""

    def __init__(self, size: int, num_terms: int, device: torch.device):
        self._sums = torch.zeros(size + num_terms, dtype=torch.float32, device=device)
        self.gradient, self._terms = self._sums[:size], self._sums[size:]

    def begin(self) -> None:
        self._sums.zero_()

    def add(self, terms: Tensor) -> None:
        self._terms += terms

    def finish(self, world: World, count: float) -> tuple[Tensor, Tensor]:
        world.all_reduce(self._sums)
        terms = self._terms.double() / count
        finite = torch.isfinite(torch.stack(torch.aminmax(self._sums))).all()
        self.gradient.div_(count)
        return terms, finite


class ExactSum:
    """A 64-bit fixed-point sum: the same bits for any order of at most `num_micro_batches`, on any workers."""

    def __init__(self, size: int, num_terms: int, device: torch.device, num_micro_batches: int):
        self.gradient = torch.zeros(size, dtype=torch.float32, device=device)
        self._sums = torch.zeros(size + num_terms + 1, dtype=torch.int64, device=device)
        self._size = size
        self._terms, self._out_of_range = self._sums[size:-1], self._sums[-1]
        self._limit = 2.0 ** (61 - math.ceil(math.log2(num_micro_batches)))
        self._chunk = min(size, CPU_CHUNK if device.type == "cpu" else GPU_CHUNK)
        self._scaled = torch.empty(self._chunk, dtype=torch.float32, device=device)
        self._integer = torch.empty(self._chunk, dtype=torch.int64, device=device)

    def begin(self) -> None:
        self.gradient.zero_()
        self._sums.zero_()

    def add(self, terms: Tensor) -> None:
        extremes: list[Tensor] = []
        for start in range(0, self._size, self._chunk):
            chunk = self.gradient[start : start + self._chunk]
            scaled, integer = self._scaled[: len(chunk)], self._integer[: len(chunk)]
            torch.mul(chunk, 1 / GRADIENT_UNIT, out=scaled).round_()
            extremes += torch.aminmax(scaled)  # NaN where there is one
            integer.copy_(scaled)
            self._sums[start : start + len(chunk)] += integer
            chunk.zero_()  # for the next micro-batch's backward pass
        units = (terms.double() / TERM_UNIT).round_()
        self._terms += units.to(torch.int64)
        in_range = (torch.stack(extremes).abs() <= self._limit).all() & (units.abs() <= self._limit).all()
        self._out_of_range += ~in_range

    def finish(self, world: World, count: float) -> tuple[Tensor, Tensor]:
        world.all_reduce(self._sums)
        in_range = self._out_of_range == 0
        for start in range(0, self._size, self._chunk):
            chunk = self.gradient[start : start + self._chunk]
            chunk.copy_(self._sums[start : start + len(chunk)].double().mul_(GRADIENT_UNIT).div_(count))
        self.gradient[:1].masked_fill_(~in_range, torch.nan)  # one is enough for the norm
        terms = self._terms.double().mul_(TERM_UNIT).div_(count)
        return terms.masked_fill_(~in_range, torch.nan), in_range


def make_sum(
    kind: str, size: int, num_terms: int, device: torch.device, num_micro_batches: int
) -> GradientSum:
    """A sum of this kind, "exact" or "fast". size: elements of the gradient; num_micro_batches: of a whole step."""
    if kind == "exact":
        return ExactSum(size, num_terms, device, num_micro_batches)
    return FastSum(size, num_terms, device)
