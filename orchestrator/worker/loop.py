"""The loop of one stage on one worker: build, resume, train, export. Imports neither Ray nor MLflow.

Every worker runs the same code; rank 0 alone writes. The step number is the data position. The loop waits for the
device when it logs a step and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.checkpoint.format import Fingerprints
from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.probes.evaluator import Evaluator, HeldOutPass, make_evaluators, measure
from minilm.orchestrator.feed.corpora import close, open_held_out
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.system.numa import keep_to_own_cores
from minilm.orchestrator.system.short_waits import short_waits_where_crowded
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.system.write_errors import is_final, writing
from minilm.orchestrator.train.build import build_distiller, compute_deterministically, make_states
from minilm.orchestrator.train.distributed import World, join_world
from minilm.orchestrator.train.numerics import AUTOCAST
from minilm.orchestrator.train.start_share import StartShares
from minilm.orchestrator.train.step import StepOutcome, train_step
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard, forget_start_failures
from minilm.orchestrator.worker.errors import Evicted, NotFinite, PeerFailed
from minilm.orchestrator.worker.export import finish_stage
from minilm.orchestrator.worker.failures import check_teacher_output
from minilm.orchestrator.worker.metric_logger import MetricLogger
from minilm.orchestrator.worker.resume import resume
from minilm.orchestrator.worker.save_policy import SavePolicy, is_kept
from minilm.orchestrator.worker.step_metrics import is_logged, rate, step_metrics
from minilm.orchestrator.worker.until import UntilPoints
from minilm.orchestrator.worker.watchdog import Watchdog, peer_timeout

log = logging.getLogger(__name__)

STOP_CHECK_SECONDS = 0.5


def run_stage(
    spec: StageSpec,
    on_step: Callable[[int], None] | None = None,
    eviction_announced: Callable[[], bool] = lambda: False,
) -> bool:
    """Train the stage's students to the end, or to a requested stop. True if the stage is done.

    `on_step(step)` is called after each update (for tests and profilers). `eviction_announced()` is asked with each
    update: once it is true on one rank, all save at that step boundary and raise `Evicted`. Raises `UserError`,
    `DataError` or `ModelError` for errors that a retry cannot cure.
    """
    with join_world(spec.runtime.device, spec.runtime.threads, peer_timeout(spec)) as world:
        on_cpu = world.device.type == "cpu"
        threads = torch.get_num_threads() if on_cpu else 1
        if on_cpu:
            keep_to_own_cores(threads)
        folder = StageFolder(Path(spec.folder))
        with writing(folder.root):
            watchdog = Watchdog(folder.worker_log(world.rank), spec.runtime.stall_seconds)
        try:
            run = StageRun(spec, world, watchdog, eviction_announced)
            try:
                with short_waits_where_crowded(threads):
                    return run.run(on_step)
            except Exception as error:
                if is_final(error) or isinstance(error, Evicted) or run.row_loader.quarantine_mask.grew():
                    run.end_attempt()  # no death that the crash loop guard should count
                raise
            finally:
                run.close()
        finally:
            watchdog.close()


class RankFlags(NamedTuple):
    """What each rank adds to the sums of a step: 0 or 1 from one rank, counts of ranks after the sum."""

    stop_requested: int
    eviction_announced: int
    save_failed: int

    @property
    def leave(self) -> bool:
        """True if the loop ends after this step."""
        return self.stop_requested > 0 or self.eviction_announced > 0


class StageRun:
    """One worker's run of a stage. `save_policy` and `crash_loop_guard` are None on all ranks but 0."""

    def __init__(
        self, spec: StageSpec, world: World, watchdog: Watchdog, eviction_announced: Callable[[], bool]
    ):
        self.spec, self.world, self.watchdog = spec, world, watchdog
        self.eviction_announced = eviction_announced
        self.stop_check_timer = Timer(STOP_CHECK_SECONDS, at_once=True)
        self.folder = StageFolder(Path(spec.folder))
        if spec.runtime.gradient_sum == "exact" and world.device.type == "cuda":
            compute_deterministically()
        self.row_loader = RowLoader(spec, world)
        self.held_out = open_held_out(spec.data)
        self.evaluators = make_evaluators(spec)
        self.until = UntilPoints(spec)
        self.distiller = build_distiller(spec, world.device)
        self.start_shares = StartShares(spec.students, self.distiller)
        self.students = make_states(spec, self.distiller)
        self.models = {
            student.name: self.start_shares.state_module(
                student.name, self.distiller.state_module(student.name)
            )
            for student in self.students
        }
        self.fingerprints = Fingerprints.of(spec, self.row_loader.stream.fingerprint)
        self.store = open_store(spec.checkpoints, self.folder.checkpoints)
        self.fence = Fence(spec.lease, self.store if spec.checkpoints else None, spec.attempt)
        self.precision, self.num_chunks = spec.runtime.precision, 1  # set by `resume`
        with self.writing():
            self.metric_logger = MetricLogger(
                spec,
                writes=world.is_rank_zero,
                workers=world.size,
                seq_len=spec.data.seq_len,
                fence=Fence(spec.lease),
            )
        self.save_policy: SavePolicy | None = None
        self.crash_loop_guard: CrashLoopGuard | None = None
        if world.is_rank_zero:
            with self.writing():
                self.crash_loop_guard = CrashLoopGuard(self.folder.root)
            saver = AsyncSaver(
                self.store,
                self.models,
                self.students,
                self.fingerprints,
                keep=spec.checkpoint_policy.keep_checkpoints,
                keep_every=spec.checkpoint_policy.keep_every_steps,
                fence=self.fence,
            )
            self.save_policy = SavePolicy(spec, self.row_loader, saver)

    def run(self, on_step: Callable[[int], None] | None) -> bool:
        """Resume, train and export. True if the stage is done, False after a requested stop."""
        first = self.resume()
        if first in (
            0,
            self.spec.steps,
        ):  # at the end too: the work directory may be new, the checkpoints elsewhere
            self.evaluate(first)
        with self.writing():
            forget_start_failures(self.folder.root, self.world.rank)
        try:
            done, flags = self.train(first, on_step)
            self.wait_for_save(done)
        except NotFinite as error:
            self.check_teacher_output(error.step)
            raise
        finally:
            self.row_loader.stop()
        is_done = done == self.spec.steps
        if flags.eviction_announced and not flags.stop_requested and not is_done:
            raise Evicted(f"step {done} is saved, because these workers are about to be replaced")
        if is_done:
            self.export()
        self.end_attempt()
        return is_done

    def resume(self) -> int:
        """The first step to compute."""
        first, self.precision, self.num_chunks, steps = resume(
            self.spec,
            self.world,
            store=self.store,
            models=self.models,
            students=self.students,
            fingerprints=self.fingerprints,
            row_loader=self.row_loader,
            fence=self.fence,
            until=self.until,
            crash_loop_guard=self.crash_loop_guard,
        )
        self.end_at(steps)
        if (dtype := AUTOCAST[self.precision]) is not None:
            self.distiller.teacher.compute_in(dtype)
        return first

    def train(self, first: int, on_step: Callable[[int], None] | None) -> tuple[int, RankFlags]:
        """All steps from `first` on, or those up to a request to leave; how many are done then, and who asked."""
        flags = RankFlags(0, 0, 0)
        self.metric_logger.restart(first)
        for step in range(first, self.spec.steps):
            if step >= self.spec.steps:  # good enough by now
                break
            self.begin_step(step)
            outcome, flags = self.train_step(step)
            done = step + 1
            self.log_if_due(step, outcome)
            self.evaluate(done)
            self.beat("training", done)
            self.save_if_due(done, flags.leave)
            if on_step:
                on_step(done)
            if flags.leave:
                return done, flags
        return self.spec.steps, flags

    def begin_step(self, step: int) -> None:
        if is_kept(self.spec, step) and not self.world.is_rank_zero:
            self.watchdog.expect_long()  # rank 0 may be waiting for the save before the one that is kept
        else:
            self.watchdog.alive()
        if self.crash_loop_guard:
            with self.writing():
                self.crash_loop_guard.reach(step)

    def train_step(self, step: int) -> tuple[StepOutcome, RankFlags]:
        """One update on all ranks. Raises `PeerFailed` on all ranks but 0 if the save before it failed."""
        try:
            outcome = train_step(
                self.distiller,
                self.students,
                self.row_loader.rows_of_step(self.metric_logger.waiting_for_rows),
                step=step,
                seed=self.spec.seed,
                learning_rate=rate(self.spec, step),
                max_gradient_norm=self.spec.optimizer.max_gradient_norm,
                autocast=AUTOCAST[self.precision],
                world=self.world,
                seq_len=self.spec.data.seq_len,
                extra_values=self.extra_values,
                num_chunks=self.num_chunks,
                by_head=self.spec.measuring.per_head and is_logged(self.spec, step + 1),
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"stage {self.spec.stage}: out of memory at step {step}, even with half a micro-batch "
                f"({self.spec.micro_batch // 2} rows) at once; lower micro_batch (now {self.spec.micro_batch})"
            ) from error
        flags = RankFlags(*outcome.extra_sums[: len(RankFlags._fields)])
        if flags.save_failed:
            if self.save_policy:
                self.save_policy.saver.wait()  # raises its error
            raise PeerFailed("rank 0 failed to save; see worker-0.log")
        self.num_chunks = outcome.num_chunks
        self.row_loader.close_step(step, outcome.extra_sums[len(flags) :])
        return outcome, flags

    def extra_values(self) -> list[int]:
        """This rank's integers to be summed over ranks with the step: `RankFlags`, then the row loader's."""
        flags = RankFlags(
            stop_requested=self.stop_check_timer() and self.folder.stop_request.exists(),
            eviction_announced=self.eviction_announced(),
            save_failed=self.save_policy is not None and self.save_policy.saver.failed,
        )
        return [*flags, *self.row_loader.extra_values()]

    def log_if_due(self, step: int, outcome: StepOutcome) -> None:
        if not is_logged(self.spec, step + 1):
            return
        metrics = step_metrics(self.spec, self.distiller, self.students, self.row_loader, step, outcome)
        with self.writing():
            self.metric_logger.step(step + 1, metrics)

    def evaluate(self, done: int) -> None:
        """Run the evaluators that are due, all of them at the ends, and log what they find. It may say that the stage
        is good enough, and so that it ends earlier than was known."""
        due = [one for one in self.evaluators if done in (0, self.spec.steps) or one.is_due(done)]
        if not due:
            return
        self.expect_long("evaluating", done)
        metrics = self.measure(due, done)
        if self.spec.until:
            self.until.take(done, metrics)
            (steps,) = self.world.broadcast([self.until.num_steps()])
            self.end_at(steps)
        if done == self.spec.steps:
            metrics |= self.measure([one for one in self.evaluators if one not in due], done)
        with self.writing():
            self.metric_logger.heldout(done, metrics)
        self.watchdog.alive()

    def measure(self, evaluators: list[Evaluator], done: int) -> dict[str, float]:
        given = HeldOutPass(
            self.distiller,
            self.held_out,
            rows=self.spec.measuring.held_out_rows,
            micro_batch=self.spec.micro_batch,
            autocast=AUTOCAST[self.precision],
            world=self.world,
            progress=lambda *part: self.beat("evaluating", done, part=part),
        )
        with self.start_shares.applied():
            return measure(evaluators, given)

    def end_at(self, steps: int) -> None:
        """From here on the stage has so many steps. On all ranks the same, as rank 0 has found."""
        if steps == self.spec.steps:
            return
        self.spec = self.metric_logger.spec = replace(self.spec, steps=steps)
        if self.save_policy:
            self.save_policy.spec = self.spec
            self.save_policy.saver.fingerprints = Fingerprints.of(self.spec, self.fingerprints.data)
            log.info("stage %s is good enough (until): it ends after step %d", self.spec.stage, steps)

    def save_if_due(self, done: int, stop: bool) -> None:
        """On rank 0, begin a checkpoint if one is due. Waits for the one in flight if this one must be made."""
        if not self.save_policy or not self.save_policy.is_due(done, stop):
            return
        if self.save_policy.saver.busy:
            self.expect_long("saving", done)
        self.save_policy.save(
            done,
            stop,
            num_chunks=self.num_chunks,
            precision=self.precision,
            points=self.until.saved(),
        )
        self.watchdog.alive()

    def wait_for_save(self, done: int) -> None:
        self.expect_long("saving", done)
        if self.save_policy:
            self.save_policy.saver.wait()

    def check_teacher_output(self, step: int) -> None:
        """Raises `UserError` if it is the teacher whose numbers are not finite."""
        check_teacher_output(
            self.spec,
            self.distiller,
            self.row_loader.stream,
            step,
            autocast=AUTOCAST[self.precision],
            device=self.world.device,
        )

    def export(self) -> None:
        """On rank 0, export the students and record that the stage is done."""
        if not self.crash_loop_guard:
            return
        with self.writing():
            self.crash_loop_guard.reach(
                self.spec.steps
            )  # a failing export is counted like a step after the last
            self.expect_long("exporting", self.spec.steps)
            self.fence.check()
            with self.start_shares.applied():
                finish_stage(
                    self.spec,
                    self.distiller,
                    data=self.fingerprints.data,
                    ledger=self.row_loader.resume_state()["digest"],
                    progress=lambda *part: self.beat("exporting", self.spec.steps, part=part, force=True),
                )

    def end_attempt(self) -> None:
        """This attempt ends in good order: the crash loop guard starts to count again."""
        if self.crash_loop_guard:
            with suppress(OSError):  # on a full disk the count stays as it was
                self.crash_loop_guard.end()

    def expect_long(self, doing: str, done: int) -> None:
        """Allow more time for what comes now, in this process's watchdog and by the heartbeat in the driver."""
        self.watchdog.expect_long()
        self.beat(doing, done, force=True)

    def beat(
        self, doing: str, done: int, *, part: tuple[int, int] | None = None, force: bool = False
    ) -> None:
        with self.writing():
            self.metric_logger.beat(doing, done, part=part, force=force)

    def writing(self) -> AbstractContextManager[None]:
        return writing(self.folder.root)

    def close(self) -> None:
        """Leave no thread running and no file open."""
        self.watchdog.expect_long()
        if self.save_policy:
            self.save_policy.saver.close()
        if self.crash_loop_guard:
            self.crash_loop_guard.close()
        self.metric_logger.close()
        self.row_loader.close()
        close(self.held_out)
