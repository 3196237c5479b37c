"""One optimiser update: micro-batches → gradient sums → sum over workers → AdamW, for every student of the stage.

The teacher's forward pass is shared; each student has its own flat gradient, optimiser and dropout stream, so its
weights do not depend on the students beside it. Dropout is seeded by (run seed, student, step, micro-batch): who
computes a micro-batch does not matter. No Ray, no MLflow, no host sync on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.distiller import Distiller
from orchestrator.world import World


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts` (SHA-256), independent of Python's hash seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StudentState:
    """A student's trained parameters, their flat gradient, and its optimiser.

    `gradient` is one float32 vector; every `parameter.grad` is a view into it, so the sum over workers and the
    norm are single operations. AdamW is Adam with decoupled weight decay (MiniLM, section 4.1); biases and
    normalisation weights, the parameters with fewer than two dimensions, are not decayed.
    """

    def __init__(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        self.name = name
        self.parameters = parameters
        first = next(iter(parameters.values()))
        self.gradient = torch.zeros(
            sum(p.numel() for p in parameters.values()), dtype=torch.float32, device=first.device
        )
        offset = 0
        for parameter in parameters.values():
            parameter.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        decayed = [p for p in parameters.values() if p.ndim >= 2]
        others = [p for p in parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def update(self, *, count: float, learning_rate: float, max_gradient_norm: float | None) -> Tensor:
        """Divide the summed gradient by `count`, clip, step. Returns the norm before clipping, on the device."""
        self.gradient.div_(count)
        norm = torch.linalg.vector_norm(self.gradient)
        if max_gradient_norm is not None:
            self.gradient.mul_(torch.clamp(max_gradient_norm / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return norm


@dataclass(frozen=True)
class StepOutcome:
    """`terms` [students, terms]: this worker's undivided sums; `norms` [students]: of the global gradient.

    Both stay on the device; `count` (global divisor) and `stop` (somebody asks to stop) are host values.
    """

    terms: Tensor
    norms: Tensor
    count: float
    stop: bool


def train_step(
    distiller: Distiller,
    students: list[StudentState],
    micro_batches: Iterable[tuple[int, Tensor, Tensor | None]],
    *,
    step: int,
    seed: int,
    learning_rate: float,
    max_gradient_norm: float | None,
    autocast: torch.dtype | None,
    stop: bool,
    world: World,
) -> StepOutcome:
    """Update every student once from this worker's `micro_batches`: (number in the global batch, ids, mask) on the CPU.

    The loss is the objective's mean over the whole global batch: sums over micro-batches and workers, divided
    once by the global count.
    """
    device = world.device
    for student in students:
        student.gradient.zero_()
    terms = torch.zeros(len(students), distiller.num_terms, dtype=torch.float32, device=device)
    count = 0.0
    for index, ids, mask in micro_batches:
        count += float(distiller.count(mask, ids.shape))
        ids = ids.to(device, non_blocking=True)
        mask = None if mask is None else mask.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            taught = distiller.teach(ids, mask)
        for row, student in enumerate(students):
            dropout = derive_seed(seed, "dropout", student.name, step, index)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                sums = distiller.term_sums(student.name, taught, ids, mask, dropout_seed=dropout)
            (sums * distiller.weights).sum().backward()
            terms[row] += sums.detach()
    count, stops = world.sum_host([count, float(stop)])
    norms = []
    for student in students:
        world.sum_gradient(student.gradient)
        norms.append(
            student.update(count=count, learning_rate=learning_rate, max_gradient_norm=max_gradient_norm)
        )
    return StepOutcome(terms, torch.stack(norms), count, stops > 0)
