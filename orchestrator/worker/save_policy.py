"""When rank 0 saves, and what is checked before a checkpoint counts; `AsyncSaver` does the writing.

A checkpoint is due by step count, by the clock, at steps that are kept for good, before a stop and at the end. It is
not committed if a number was not finite, if the rows of its steps are not the expected ones, or if another run has
taken over (the saver's fence).
"""

from __future__ import annotations

import torch

from minilm.orchestrator.checkpoint.async_saver import AsyncSaver, TensorsByFile
from minilm.orchestrator.checkpoint.format import ResumeState
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.worker.failures import check_finite

WAIT_SECONDS = 1.0


class SavePolicy:
    """Decides when `saver` saves, and what it checks before it writes."""

    def __init__(self, spec: StageSpec, row_loader: RowLoader, saver: AsyncSaver):
        self.spec, self.row_loader, self.saver = spec, row_loader, saver
        self.overdue = False
        self.timer = Timer(spec.checkpoint_policy.checkpoint_every_seconds)

    def is_due(self, done: int, stop: bool) -> bool:
        """True if a save is due after `done` steps. stop: the loop ends after this step.

        A save due by step count waits up to `WAIT_SECONDS` for the one in flight; if that is still running, it is
        retried after each following step without waiting again.
        """
        every = self.spec.checkpoint_policy.checkpoint_every_steps
        if every is not None and done % every == 0 and not self.overdue:
            self.saver.wait_a_little(WAIT_SECONDS)
            self.overdue = True
        return self._must(done, stop) or (not self.saver.busy and (self.overdue or self.timer()))

    def save(
        self,
        done: int,
        stop: bool,
        *,
        num_chunks: int,
        precision: str,
        points: dict[str, dict[str, float]],
    ) -> None:
        """Begin a checkpoint, after the one in flight. Raises the error that the previous save ended with."""
        self.overdue = False
        self.timer.restart()
        steps = self.row_loader.ledger.pop_steps_to_check()

        def check(copy: TensorsByFile) -> None:
            for student in self.saver.students:
                skipped = copy[f"{student.name}.optimizer"]["refused"].tolist()
                check_finite(self.spec, self.row_loader.stream, student.name, skipped)
            assert self.row_loader.expected is not None, "rank 0 saves"
            self.row_loader.expected.check(steps)

        state = ResumeState(
            self.row_loader.resume_state(), torch.get_num_threads(), num_chunks, precision, points
        )
        self.saver.save(done, state, check, must=self._must(done, stop))

    def _must(self, done: int, stop: bool) -> bool:
        """True if the checkpoint is made even if that means to wait for the one in flight."""
        return stop or done == self.spec.steps or is_kept(self.spec, done)


def is_kept(spec: StageSpec, done: int) -> bool:
    """True if the checkpoint after `done` steps is kept for good; the loop waits until it can be made."""
    every = spec.checkpoint_policy.keep_every_steps
    return every is not None and done % every == 0
