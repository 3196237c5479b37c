"""What an evaluator is, and what it is given: teacher, students and held-out rows, in evaluation mode.

All workers compute a part of the forward passes. Their parts are put together without rounding, so that a value has
the same bits on every worker, and for any number of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from minilm.data.read.rows import Rows
from minilm.data.stream import partition
from minilm.model.distiller import Distiller
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.probes.catalogue import DIVERGENCE, PROBES
from minilm.orchestrator.feed.corpora import HeldOut
from minilm.orchestrator.stage.spec import ProbeSpec, StageSpec
from minilm.orchestrator.train.bucketing import by_length
from minilm.orchestrator.train.distributed import World


class Batch(NamedTuple):
    """Rows of micro-batch `number`, on this worker's device. ids: int64 [rows, tokens]; mask: bool of the same shape,
    None without padding."""

    number: int
    ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class HeldOutPass:
    """What an evaluator is given. Students are in evaluation mode, and nothing records gradients.

    `progress(done, total)` is told of this worker's micro-batches.
    """

    distiller: Distiller
    corpora: Sequence[HeldOut]
    rows: int
    micro_batch: int
    autocast: torch.dtype | None
    world: World
    progress: Callable[[int, int], None] = lambda done, total: None

    def parts(self) -> Iterator[tuple[HeldOut, int, float]]:
        """Each corpus with how many of its first rows are measured, at least one, and its fraction of the mixture."""
        total = sum(corpus.weight for corpus in self.corpora)
        for corpus in self.corpora:
            fraction = corpus.weight / total
            yield corpus, min(max(1, round(self.rows * fraction)), corpus.rows.num_rows), fraction

    def num_batches(self, rows: int) -> int:
        return -(-rows // self.micro_batch)

    def batches_of(self, held_out: Rows, rows: int, *, one_each: bool = False) -> Iterator[Batch]:
        """This worker's micro-batches of the first `rows` rows, cut by length where rows have padding. Of rows that
        hold several documents all, or with one_each the first."""
        size, world = self.micro_batch, self.world
        mine = partition(self.num_batches(rows), world.rank, world.size)
        for done, number in enumerate(mine):
            self.progress(done, len(mine))
            batch = held_out.read(range(number * size, min((number + 1) * size, rows)))
            for ids, mask in by_length(*(batch.first_documents if one_each else batch).sequences):
                yield Batch(number, ids.to(world.device), None if mask is None else mask.to(world.device))

    def batches(self) -> Iterator[Batch]:
        """This worker's micro-batches of all corpora."""
        for corpus, rows, _ in self.parts():
            yield from self.batches_of(corpus.rows, rows)


class Evaluator(ABC):
    """Measures the students of a stage after every `every` steps (None: not between the ends), before and after.

    It lives as long as an attempt, so that it can keep what it has found of the teacher, which does not change.
    """

    def __init__(self, probe: ProbeSpec, stage: StageSpec):
        self.name, self.every, self.probe, self.stage = probe.probe, probe.every, probe, stage

    def is_due(self, done: int) -> bool:
        """True if it measures after `done` steps, the ends aside."""
        return self.every is not None and done % self.every == 0

    @abstractmethod
    def run(self, given: HeldOutPass) -> dict[str, dict[str, float]]:
        """Values by student and metric, logged as STUDENT/heldout/METRIC: on every worker the same."""

    def metrics(self, value: float, of_teacher: float | None = None) -> dict[str, float]:
        """A student's value as it is logged, with its share of the teacher's. UserError where that is no share."""
        if of_teacher is None:
            return {metric_of(self.name): value}
        if not of_teacher > 0:
            raise UserError(
                f"stage {self.stage.stage}: the teacher's own value of probe {self.name} is {of_teacher:.3g}, of which "
                f"no student can keep a share; leave the probe out, or take another teacher"
            )
        return {metric_of(self.name): value, share_of(self.name): value / of_teacher}


def metric_of(probe: str) -> str:
    return f"probe/{probe}"


def share_of(probe: str) -> str:
    """The metric that holds a value's share of the teacher's."""
    return f"probe/{probe}/share-of-teacher"


def make_evaluators(stage: StageSpec) -> list[Evaluator]:
    """Of the stage's probes in their order, the divergence before them where they do not name it."""
    probes = stage.evaluate
    if DIVERGENCE not in [probe.probe for probe in probes]:
        probes = (ProbeSpec(DIVERGENCE, stage.measuring.eval_every), *probes)
    return [evaluator_class(probe.probe)(probe, stage) for probe in probes]


def evaluator_class(name: str) -> type[Evaluator]:
    module, _, attribute = PROBES[name].evaluator.partition(":")
    path = module if "." in module else f"minilm.orchestrator.evaluation.probes.{module}"
    found: type[Evaluator] = getattr(import_module(path), attribute)
    return found


def measure(evaluators: Iterable[Evaluator], given: HeldOutPass) -> dict[str, float]:
    """What the evaluators find, as a point of the log has it. Leaves the students in training mode."""
    found: dict[str, float] = {}
    device = given.world.device.type
    given.distiller.eval()
    with torch.no_grad(), torch.autocast(device, given.autocast, enabled=given.autocast is not None):
        for evaluator in evaluators:
            for student, values in evaluator.run(given).items():
                found |= {f"{student}/heldout/{metric}": value for metric, value in values.items()}
    given.distiller.train()
    return found
