"""One optimiser update: micro-batches → gradient sums → sum over workers → AdamW, for every student of the stage.

The teacher's forward pass is shared; each student has its own gradient sum, optimiser and dropout stream, so its
weights do not depend on the students beside it. Dropout is seeded by (run seed, student, step, micro-batch), so it
does not matter who computes a micro-batch. Rows with padding are computed end to end, or in groups of like length
(bucketing.py). No Ray, no MLflow, no host sync on the device.

A gradient or loss that is not finite never moves a weight: the sum that all ranks share carries the verdict on the
device, and the fused AdamW skips that update on the device too. The host learns of it when it next reads (log steps).

Out of memory: this worker computes its part of the step again in halves, and from the next step on every worker
does. Rows and their weight in the loss stay the same; dropout masks and the last bits do not, because each half draws
a mask of its own: memory for the whole micro-batch's is what was missing.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from minilm.model.distiller import Distiller
from minilm.model.encoder.taps import Blocks
from minilm.orchestrator.train.bucketing import by_length, end_to_end
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.gradient_sum import make_sum

log = logging.getLogger(__name__)

MicroBatch = tuple[int, Tensor, Tensor | None]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts` (SHA-256), independent of Python's hash seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StudentState:
    """A student's trained parameters, the sum of their gradients, and its optimiser.

    `sums.gradient` is one float32 vector; every `parameter.grad` is a view into it, so the sum over workers and the
    norm are single operations. AdamW is Adam with decoupled weight decay (MiniLM, section 4.1); biases and
    normalisation weights, the parameters with fewer than two dimensions, are not decayed.

    gradient_sum: "exact" or "fast" (see gradient_sum.py), for steps of `num_micro_batches` and `num_terms` values.
    on_nonfinite: after an update that was not finite, "stop" skips all later ones too, "skip" goes on.
    skipped: int64 [3], on the device: how many updates were skipped as not finite; the first ("stop") or last ("skip")
    step of them, -1 for none; 1 when the student has stopped.
    """

    def __init__(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        gradient_sum: str = "fast",
        num_micro_batches: int = 1,
        num_terms: int = 1,
        on_nonfinite: str = "stop",
    ):
        self.name = name
        self.parameters = parameters
        self.on_nonfinite = on_nonfinite
        device = next(iter(parameters.values())).device
        size = sum(p.numel() for p in parameters.values())
        self.sums = make_sum(gradient_sum, size, num_terms, device, num_micro_batches)
        self.skipped = torch.tensor([0, -1, 0], dtype=torch.int64, device=device)
        offset = 0
        for parameter in parameters.values():
            parameter.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        decayed = [p for p in parameters.values() if p.ndim >= 2]
        others = [p for p in parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @property
    def gradient(self) -> Tensor:
        return self.sums.gradient

    def update(
        self, finite: Tensor, *, step: int, learning_rate: float, max_gradient_norm: float | None
    ) -> Tensor:
        """Clip the mean gradient and move the weights, unless it is not `finite`; returns the norm before clipping.

        finite: a bool scalar on the device. The norm stays there too.
        """
        norm = torch.linalg.vector_norm(self.gradient)
        finite = finite & torch.isfinite(norm)
        if max_gradient_norm is not None:
            self.gradient.mul_(torch.clamp(max_gradient_norm / (norm + 1e-6), max=1.0))
        count, last, stopped = self.skipped
        skip = ~finite & (stopped == 0)
        stop = skip if self.on_nonfinite == "stop" else torch.zeros_like(skip)
        self.skipped = torch.stack((count + skip, torch.where(skip, step, last), stopped | stop))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.found_inf = (~finite | stopped).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm


@dataclass(frozen=True)
class StepOutcome:
    """terms: float64 [students, terms], the global means. norms: [students], of the mean gradient. heads: float64
    [students, relations, heads], the relations' means by head, zeros unless they were asked for.

    These stay on the device and are the same on all ranks, as are the host values: `count`, the divisor of the sums;
    `extra_sums`, the sums over ranks of `extra_values`; `num_chunks`, into how many chunks of rows each micro-batch is
    split from the next step on.
    """

    terms: Tensor
    heads: Tensor
    norms: Tensor
    count: int
    extra_sums: list[int]
    num_chunks: int


def train_step(
    distiller: Distiller,
    students: list[StudentState],
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    seed: int,
    learning_rate: float,
    max_gradient_norm: float | None,
    autocast: torch.dtype | None,
    world: World,
    seq_len: int,
    extra_values: Callable[[], Sequence[int]] = tuple,
    num_chunks: int = 1,
    by_head: bool = False,
) -> StepOutcome:
    """Update every student once from this worker's `micro_batches`: (number in the global batch, ids, mask) on the CPU.

    The loss is the objective's mean over the whole global batch: sums over micro-batches and workers, divided once
    by the global count. seq_len: tokens of a row. extra_values: called after the last row; the integers that it
    returns, equally many on every rank, are summed in the all-reduce that the step needs anyway. num_chunks: into how
    many chunks of rows each micro-batch is split. by_head: compute the relations' values by head too, which costs one
    more forward of the loss. Raises `torch.OutOfMemoryError` when half a micro-batch does not fit either.
    """
    read: list[MicroBatch] = []
    remaining = iter(micro_batches)
    local = LocalStep(distiller, students, step, seed, autocast, world.device, seq_len, by_head)
    out_of_memory = False
    try:
        local.compute(_recorded(remaining, read), num_chunks)
    except torch.OutOfMemoryError:
        if num_chunks > 1 or read[-1][1].shape[0] < 2:
            raise
        out_of_memory = True  # retried outside this block: the error's traceback keeps the tensors alive
    if out_of_memory:
        log.warning(
            "step %d: out of memory with %d rows at once; from here on each micro-batch is computed in halves: "
            "same rows and weights in the loss, other dropout masks and last bits",
            step,
            read[-1][1].shape[0],
        )
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        local.compute(chain(read, remaining), 2)
    count, halved, *extra_sums = world.all_reduce_integers([local.count, int(out_of_memory), *extra_values()])
    values, norms = [], []
    for student in students:
        means, finite = student.sums.finish(world, max(count, 1) * local.unit)  # no valid token: zeros
        values.append(means)
        norms.append(
            student.update(
                finite, step=step, learning_rate=learning_rate, max_gradient_norm=max_gradient_norm
            )
        )
    terms, heads = torch.stack(values).split([distiller.num_terms, math.prod(distiller.head_shape)], dim=1)
    heads = heads.unflatten(1, distiller.head_shape)
    return StepOutcome(terms, heads, torch.stack(norms), count, extra_sums, 2 if halved else num_chunks)


def _recorded(micro_batches: Iterable[MicroBatch], read: list[MicroBatch]) -> Iterable[MicroBatch]:
    for micro_batch in micro_batches:
        read.append(micro_batch)
        yield micro_batch


class LocalStep:
    """One worker's part of a step: forward and backward of its micro-batches, added to the students' sums.

    unit: a power of two by which losses are multiplied, so that a row weighs about 1 whether the objective counts
    rows or tokens, and gradients have the magnitude that `gradient_sum.ExactSum` is made for.
    """

    def __init__(
        self,
        distiller: Distiller,
        students: list[StudentState],
        step: int,
        seed: int,
        autocast: torch.dtype | None,
        device: torch.device,
        seq_len: int,
        by_head: bool,
    ):
        self.distiller, self.students, self.step, self.seed = distiller, students, step, seed
        self.autocast, self.device, self.by_head = autocast, device, by_head
        self.count = 0
        self.unit = 2.0 ** -math.ceil(math.log2(int(distiller.count(None, (1, seq_len)))))

    def compute(self, micro_batches: Iterable[MicroBatch], num_chunks: int) -> None:
        """Compute all of `micro_batches`, each in groups of rows of like length, each group in `num_chunks` chunks."""
        self.count = 0
        for student in self.students:
            student.sums.begin()
        for index, ids, mask in micro_batches:
            self.count += int(self.distiller.count(mask, ids.shape))
            chunks = [part for rows in _chunks(ids, mask, num_chunks) for part in self.parts(*rows)]
            totals = [torch.zeros(num_values(self.distiller), device=self.device) for _ in self.students]
            for number, chunk in enumerate(chunks):
                self.compute_chunk((index,) if len(chunks) == 1 else (index, number), *chunk, totals)
            for student, total in zip(self.students, totals, strict=True):
                student.sums.add(total * self.unit)

    def parts(self, ids: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor | Blocks | None]]:
        """What is computed at a time of these rows; see bucketing.py."""
        if mask is not None and self.device.type == "cpu" and self.distiller.objective.takes_blocks:
            sequence = end_to_end(ids, mask, few_lengths=self.autocast is not None)
            if sequence is not None:
                return [sequence]
        return [*by_length(ids, mask)]

    def compute_chunk(
        self, number: tuple[int, ...], ids: Tensor, mask: Tensor | Blocks | None, totals: list[Tensor]
    ) -> None:
        """Teacher, students, loss and backward; adds each student's sums, terms and then heads, to its total.

        number: of the micro-batch in the step, and of the chunk in it where there are several; it seeds the dropout.
        """
        num_terms = self.distiller.num_terms
        ids = _to_device(ids, self.device)
        if mask is not None:
            mask = mask if isinstance(mask, Blocks) else _to_device(mask, self.device)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            teacher_output = self.distiller.teacher_forward(ids, mask)
        for student, total in zip(self.students, totals, strict=True):
            dropout = derive_seed(self.seed, "dropout", student.name, self.step, *number)
            heads = total[num_terms:].view(self.distiller.head_shape) if self.by_head else None
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                sums = self.distiller.term_sums(
                    student.name, teacher_output, ids, mask, dropout_seed=dropout, heads=heads
                )
            (sums * self.distiller.weights).sum().mul(self.unit).backward()
            total[:num_terms] += sums.detach()


def num_values(distiller: Distiller) -> int:
    """How many values a student's sums hold besides its gradient: its terms, and its relations by head."""
    return distiller.num_terms + math.prod(distiller.head_shape)


def _chunks(ids: Tensor, mask: Tensor | None, number: int) -> Iterable[tuple[Tensor, Tensor | None]]:
    masks: Sequence[Tensor | None] = [None] * number if mask is None else mask.chunk(number)
    return zip(ids.chunk(number), masks, strict=False)  # fewer rows than chunks: fewer chunks


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: from pageable memory a copy to a GPU would make the host wait."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
