"""The loop of one stage on one worker: build, resume, train, export. Imports neither Ray nor MLflow.

Every worker runs the same code; rank 0 alone writes. Resuming looks, in this order, at the stage's own newest sound
checkpoint, then at the initialisation that the recipe asks for; rank 0 chooses, the others load the same. The step
number is the data position. The loop waits for the device when it logs a step and nowhere else.

`python -m minilm.orchestrator.worker STAGE.json` runs a stage without any launcher, alone or under torchrun.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.format import Fingerprints
from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.errors import LeaseHeld, UserError
from minilm.orchestrator.feed.corpora import close, open_held_out
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import check_writer
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.system.write_errors import is_final, writing
from minilm.orchestrator.train.build import build_distiller, compute_deterministically, make_states
from minilm.orchestrator.train.distributed import World, join_world
from minilm.orchestrator.train.numerics import AUTOCAST, PRECISIONS, choose_precision, choose_threads
from minilm.orchestrator.train.step import StepOutcome, train_step
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard, forget_start_failures
from minilm.orchestrator.worker.errors import Evicted, PeerFailed
from minilm.orchestrator.worker.evaluate import heldout_divergence
from minilm.orchestrator.worker.export import finish_stage
from minilm.orchestrator.worker.failures import no_progress
from minilm.orchestrator.worker.metric_logger import MetricLogger
from minilm.orchestrator.worker.save_policy import SavePolicy, is_kept
from minilm.orchestrator.worker.step_metrics import is_logged, rate, step_metrics
from minilm.orchestrator.worker.watchdog import Watchdog, peer_timeout

log = logging.getLogger(__name__)


STOP_CHECK_SECONDS = 0.5


def run_stage(
    spec: StageSpec,
    on_step: Callable[[int], None] | None = None,
    eviction_announced: Callable[[], bool] = lambda: False,
) -> bool:
    """Train the stage's students to the end, or to a requested stop. True when the stage is done.

    `on_step(step)` is called after each update (for tests and profilers). `eviction_announced()` is asked before each
    update: once one rank is told so, all save at the next step boundary and raise `Evicted`. Raises `UserError`,
    `DataError` or `ModelError` for what a retry can't cure.
    """
    with join_world(spec.device, spec.threads, peer_timeout(spec)) as world:
        folder = StageFolder(Path(spec.folder))
        with writing(folder.root):
            watchdog = Watchdog(folder.worker_log(world.rank), spec.stall_seconds)
        try:
            run = StageRun(spec, world, watchdog, eviction_announced)
            try:
                return run.run(on_step)
            except Exception as error:
                if is_final(error) or isinstance(error, Evicted) or run.intake.masking.grew():
                    run.end_attempt()  # nothing to count
                raise
            finally:
                run.close()
        finally:
            watchdog.close()


class StageRun:
    """`saving` and `attempts` exist on the main rank only."""

    def __init__(
        self, spec: StageSpec, world: World, watchdog: Watchdog, eviction_announced: Callable[[], bool]
    ):
        self.spec, self.world, self.watchdog = spec, world, watchdog
        self.eviction_announced = eviction_announced
        self.folder = StageFolder(Path(spec.folder))
        self.precision = spec.precision  # for good from `resume` on
        if spec.reduction == "exact" and world.device.type == "cuda":
            compute_deterministically()
        self.fixed_threads = spec.reduction == "exact" and world.device.type == "cpu"
        self.intake = RowLoader(spec, world)
        self.heldout = open_held_out(spec.data)
        self.distiller = build_distiller(spec, world.device)
        self.students = make_states(spec, self.distiller)
        self.models = {student.name: self.distiller.state_module(student.name) for student in self.students}
        self.fingerprints = Fingerprints(spec.digest, self.intake.stream.fingerprint)
        self.parts = 1
        self.store = open_store(spec.checkpoints, self.folder.checkpoints)
        self.stop_check_due = Timer(STOP_CHECK_SECONDS, at_once=True)
        with self.writing():
            self.journal = MetricLogger(
                spec,
                writes=world.is_rank_zero,
                workers=world.size,
                seq_len=spec.data.seq_len,
                guard=self.check_lease,
            )
        self.saving: SavePolicy | None = None
        self.attempts: CrashLoopGuard | None = None
        if world.is_rank_zero:
            with self.writing():
                self.attempts = CrashLoopGuard(self.folder.root)
            self.saving = SavePolicy(
                spec,
                self.intake,
                self.store,
                self.models,
                self.students,
                self.fingerprints,
                self.check_writer,
            )

    def run(self, on_step: Callable[[int], None] | None) -> bool:
        spec = self.spec
        first = done = self.resume()
        stop = evicted = False
        if first in (0, spec.steps):  # at the end, too: another work directory may have measured it
            self.evaluate(first)
        with self.writing():
            forget_start_failures(self.folder.root, self.world.rank)
        self.journal.restart(first)
        try:
            for step in range(first, spec.steps):
                self.begin_step(step)
                outcome = self.train(step)
                done, stop, evicted = step + 1, outcome.extra_sums[0] > 0, outcome.extra_sums[1] > 0
                if is_logged(spec, done):
                    point = step_metrics(spec, self.distiller, self.students, self.intake, step, outcome)
                    with self.writing():
                        self.journal.step(done, point)
                if done == spec.steps or (spec.eval_every and done % spec.eval_every == 0):
                    self.evaluate(done)
                with self.writing():
                    self.journal.beat("training", done)
                self.save_if_due(done, stop or evicted)
                if on_step:
                    on_step(done)
                if stop or evicted:
                    break
        finally:
            self.intake.stop()
        self.expect_long("saving", done)
        if self.saving:
            self.saving.saver.wait()
        if evicted and not stop and done < spec.steps:
            raise Evicted(f"step {done} is saved, because these workers are about to be replaced")
        if done == spec.steps and self.world.is_rank_zero:
            with self.writing():
                if self.attempts:
                    self.attempts.reach(done)  # a failing export is counted like a step, one behind the last
                self.expect_long("exporting", done)
                self.check_writer()
                finish_stage(
                    spec, self.distiller, data=self.fingerprints.data, ledger=self.intake.facts()["digest"]
                )
        self.end_attempt()
        return done == spec.steps

    def resume(self) -> int:
        """The first step to compute: everything is as it was before it. The main rank chooses the checkpoint."""
        spec = self.spec
        found, error = None, None
        first = 0
        if self.world.is_rank_zero:
            try:
                self.check_writer()
                found = checkpoint.restore_newest(self.store, self.models, self.students, self.fingerprints)
                first = found[0] if found else 0
                self.begin_attempt(first)
            except Exception as problem:  # the others must hear of it before it is raised
                error = problem
        before = (found[1].threads, found[1].precision) if found else (None, None)
        threads = choose_threads(spec.threads, before[0], exact=self.fixed_threads)
        precision = choose_precision(spec.precision, before[1], self.world.device)
        chosen = [first, threads, PRECISIONS.index(precision), self.intake.masking.digest]
        failed, first, threads, number, masked = self.world.broadcast([error is not None, *chosen])
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("the main rank cannot resume, and says why")
        self.intake.masking.check_main(masked)
        self.precision = PRECISIONS[number]
        if self.fixed_threads:
            torch.set_num_threads(threads)
        books: dict[str, Any] = {}
        if first:
            facts = (
                found[1] if found else checkpoint.restore_step(self.store, first, self.models, self.students)
            )
            self.parts, books = facts.parts, facts.ledger
        self.intake.begin(first, books)
        if self.world.is_rank_zero:
            log.info("stage %s: %s", self.spec.stage, f"resumes at step {first}" if first else "starts")
        return first

    def begin_attempt(self, first: int) -> None:
        assert self.attempts
        with self.writing():
            step = self.attempts.begin(first)
        if step is not None:
            raise no_progress(self.spec, self.intake.stream, step)

    def end_attempt(self) -> None:
        """This attempt ends in good order."""
        if self.attempts:
            with suppress(OSError):  # on a full disk the count stays as it was
                self.attempts.end()

    def begin_step(self, step: int) -> None:
        if is_kept(self.spec, step) and not self.world.is_rank_zero:
            self.watchdog.expect_long()  # for the main rank, which may be waiting for the save before this one
        else:
            self.watchdog.alive()

    def train(self, step: int) -> StepOutcome:
        """One update, and what all ranks have told each other with it."""
        if self.attempts:
            with self.writing():
                self.attempts.reach(step)
        try:
            outcome = train_step(
                self.distiller,
                self.students,
                self.intake.rows_of_step(self.journal.waiting_for_rows),
                step=step,
                seed=self.spec.seed,
                learning_rate=rate(self.spec, step),
                max_gradient_norm=self.spec.max_gradient_norm,
                autocast=AUTOCAST[self.precision],
                world=self.world,
                seq_len=self.spec.data.seq_len,
                extra_values=self.tell,
                num_chunks=self.parts,
                by_head=self.spec.per_head and is_logged(self.spec, step + 1),
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"stage {self.spec.stage}: out of memory at step {step}, even with half a micro-batch "
                f"({self.spec.micro_batch // 2} rows) at once; lower micro_batch (now {self.spec.micro_batch})"
            ) from error
        _, _, failed, *told = outcome.extra_sums
        if failed:
            if self.saving:
                self.saving.saver.wait()
            raise PeerFailed("the main rank could not save, and says why")
        self.parts = outcome.num_chunks
        self.intake.close_step(step, told)
        return outcome

    def tell(self) -> list[int]:
        """To be added over ranks with the step: is a stop requested, is this group about to be replaced,
        did the last save fail, and what was taken in."""
        stop = self.stop_check_due() and self.folder.stop_request.exists()
        failed = self.saving is not None and self.saving.saver.failed
        return [stop, self.eviction_announced(), failed, *self.intake.tell()]

    def evaluate(self, step: int) -> None:
        self.expect_long("evaluating", step)
        divergence = heldout_divergence(
            self.distiller,
            self.heldout,
            rows=self.spec.held_out_rows,
            micro_batch=self.spec.micro_batch,
            autocast=AUTOCAST[self.precision],
            world=self.world,
        )
        with self.writing():
            self.journal.heldout(step, divergence)
        self.watchdog.alive()

    def save_if_due(self, done: int, stop: bool) -> None:
        """On the main rank: begin a checkpoint, waiting for the one in flight where it must be."""
        if not self.saving or not self.saving.is_due(done, stop):
            return
        if self.saving.saver.busy:
            self.expect_long("saving", done)
        self.saving.save(done, stop, parts=self.parts, precision=self.precision)
        self.watchdog.alive()

    def expect_long(self, doing: str, step: int) -> None:
        """What comes now may take long: told to this process's watchdog, and to the driver."""
        self.watchdog.expect_long()
        with self.writing():
            self.journal.beat(doing, step, force=True)

    def writing(self) -> AbstractContextManager[None]:
        return writing(self.folder.root)

    def check_lease(self) -> None:
        """Before a point or a heartbeat: asks the work directory alone, because the loop waits for the answer."""
        check_writer(self.spec.lease)

    def check_writer(self) -> None:
        """Before a checkpoint or an export: the store of the checkpoints may be another run's by now, too."""
        self.check_lease()
        owner = self.store.owner() if self.spec.checkpoints else None
        if owner not in (None, self.spec.attempt):
            raise LeaseHeld(
                f"stage {self.spec.stage}: another run ({owner}) has taken over the checkpoints in {self.store.where}; "
                f"let one of the two go on, or give this one another compute.checkpoints"
            )

    def close(self) -> None:
        """Leave nothing running and no file open."""
        self.watchdog.expect_long()
        if self.saving:
            self.saving.saver.close()
        if self.attempts:
            self.attempts.close()
        self.journal.close()
        self.intake.close()
        close(self.heldout)
