"""When the main rank saves, and what has to be true before a checkpoint counts: the writing itself is `saver`'s.

A checkpoint is due by step count, by the clock, where it is kept for good, before a stop and at the end. Nothing is
committed that was made from other rows than it should have been, with a number that was not finite, or by a worker
whose run has been taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from orchestrator.checkpoint import Facts, Identity
from orchestrator.checkpoint_store import CheckpointStore
from orchestrator.guards import check_finite
from orchestrator.intake import Intake
from orchestrator.journal import Due
from orchestrator.saver import Parts, Saver
from orchestrator.stage import StageJob
from orchestrator.step import StudentState

WAIT_SECONDS = 1.0


class Saving:
    """`guard()` raises where this worker must not write any more."""

    def __init__(
        self,
        job: StageJob,
        intake: Intake,
        store: CheckpointStore,
        models: Mapping[str, torch.nn.Module],
        students: Sequence[StudentState],
        identity: Identity,
        guard: Callable[[], None],
    ):
        self.job, self.intake, self.students, self.guard = job, intake, students, guard
        self.saver = Saver(
            store,
            models,
            students,
            identity,
            keep=job.keep_checkpoints,
            keep_every=job.keep_every_steps,
            guard=guard,
        )
        self.overdue = False
        self.clock = Due(job.checkpoint_every_seconds)

    def is_due(self, done: int, stop: bool) -> bool:
        """After `done` steps, before a `stop` or not.

        By step count it waits for the save in flight a little, once: behind a store that is slower, it comes later.
        """
        every = self.job.checkpoint_every_steps
        if every is not None and done % every == 0 and not self.overdue:
            self.saver.wait_a_little(WAIT_SECONDS)
            self.overdue = True
        return self._must(done, stop) or (not self.saver.busy and (self.overdue or self.clock()))

    def save(self, done: int, stop: bool, *, parts: int, precision: str) -> None:
        """Begin a checkpoint. Raises what the save before it, or a check of it, has ended with."""
        self.overdue = False
        self.clock.restart()
        steps = self.intake.ledger.cut()

        def check(copy: Parts) -> None:
            for student in self.students:
                refused = copy[f"{student.name}.optimizer"]["refused"].tolist()
                check_finite(self.job, self.intake.stream, student.name, refused)
            self.guard()
            assert self.intake.expected is not None, "the main rank saves"
            self.intake.expected.check(steps)

        facts = Facts(self.intake.facts(), torch.get_num_threads(), parts, precision)
        self.saver.save(done, facts, check, must=self._must(done, stop))

    def _must(self, done: int, stop: bool) -> bool:
        """Whatever the save in flight is doing."""
        return stop or done == self.job.steps or is_kept(self.job, done)


def is_kept(job: StageJob, done: int) -> bool:
    """Is the checkpoint after `done` steps one to be kept for good, and waited for?"""
    return job.keep_every_steps is not None and done % job.keep_every_steps == 0
