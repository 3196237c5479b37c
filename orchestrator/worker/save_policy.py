"""When the main rank saves, and what has to be true before a checkpoint counts: the writing itself is `saver`'s.

A checkpoint is due by step count, by the clock, where it is kept for good, before a stop and at the end. Nothing is
committed that was made from other rows than it should have been, with a number that was not finite, or by a worker
whose run has been taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from minilm.orchestrator.checkpoint.async_saver import AsyncSaver, TensorsByFile
from minilm.orchestrator.checkpoint.format import Fingerprints, ResumeState
from minilm.orchestrator.checkpoint.store import CheckpointStore
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.train.step import StudentState
from minilm.orchestrator.worker.failures import check_finite

WAIT_SECONDS = 1.0


class SavePolicy:
    """`guard()` raises where this worker must not write any more."""

    def __init__(
        self,
        spec: StageSpec,
        intake: RowLoader,
        store: CheckpointStore,
        models: Mapping[str, torch.nn.Module],
        students: Sequence[StudentState],
        fingerprints: Fingerprints,
        guard: Callable[[], None],
    ):
        self.spec, self.intake, self.students, self.guard = spec, intake, students, guard
        self.saver = AsyncSaver(
            store,
            models,
            students,
            fingerprints,
            keep=spec.checkpoint_policy.keep_checkpoints,
            keep_every=spec.checkpoint_policy.keep_every_steps,
            guard=guard,
        )
        self.overdue = False
        self.clock = Timer(spec.checkpoint_policy.checkpoint_every_seconds)

    def is_due(self, done: int, stop: bool) -> bool:
        """After `done` steps, before a `stop` or not.

        By step count it waits for the save in flight a little, once: behind a store that is slower, it comes later.
        """
        every = self.spec.checkpoint_policy.checkpoint_every_steps
        if every is not None and done % every == 0 and not self.overdue:
            self.saver.wait_a_little(WAIT_SECONDS)
            self.overdue = True
        return self._must(done, stop) or (not self.saver.busy and (self.overdue or self.clock()))

    def save(self, done: int, stop: bool, *, parts: int, precision: str) -> None:
        """Begin a checkpoint. Raises what the save before it, or a check of it, has ended with."""
        self.overdue = False
        self.clock.restart()
        steps = self.intake.ledger.cut()

        def check(copy: TensorsByFile) -> None:
            for student in self.students:
                refused = copy[f"{student.name}.optimizer"]["refused"].tolist()
                check_finite(self.spec, self.intake.stream, student.name, refused)
            self.guard()
            assert self.intake.expected is not None, "the main rank saves"
            self.intake.expected.check(steps)

        facts = ResumeState(self.intake.facts(), torch.get_num_threads(), parts, precision)
        self.saver.save(done, facts, check, must=self._must(done, stop))

    def _must(self, done: int, stop: bool) -> bool:
        """Whatever the save in flight is doing."""
        return stop or done == self.spec.steps or is_kept(self.spec, done)


def is_kept(spec: StageSpec, done: int) -> bool:
    """Is the checkpoint after `done` steps one to be kept for good, and waited for?"""
    return (
        spec.checkpoint_policy.keep_every_steps is not None
        and done % spec.checkpoint_policy.keep_every_steps == 0
    )
