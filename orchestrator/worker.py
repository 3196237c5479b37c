"""The loop of one stage on one worker: build, resume, train, export. Imports neither Ray nor MLflow.

Every worker runs the same code; rank 0 alone writes. Resuming looks, in this order, at the stage's own newest sound
checkpoint, then at the initialisation that the recipe asks for; rank 0 chooses, the others load the same. The step
number is the data position. The loop waits for the device when it logs a step and nowhere else.

`python -m orchestrator.worker JOB.json` runs a stage without any launcher, alone or under torchrun.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.errors import DataError
from data.stream import Batch, RowReader, Stream, share
from model.distiller import Distiller
from model.encoder import TappedEncoder, build_student, load_encoder
from model.errors import ModelError
from model.export import export_student, model_card, weights_digest
from model.objective import Objective
from orchestrator import checkpoint
from orchestrator.attempts import MAX_FAILURES, Attempts
from orchestrator.errors import NoProgress, UserError
from orchestrator.evaluate import heldout_divergence
from orchestrator.files import read_json, write_json
from orchestrator.ledger import Expected, Ledger
from orchestrator.metrics import PointLog
from orchestrator.saver import Parts, Saver
from orchestrator.schedule import learning_rate
from orchestrator.stage import StageFolder, StageJob
from orchestrator.step import MicroBatch, StepOutcome, StudentState, derive_seed, train_step
from orchestrator.world import PeerFailed, World, join_world

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
STOP_CHECK_SECONDS = 0.5
NAMED_ROWS = 8
PEER_REPORT_SECONDS = 1.0


class Superseded(Exception):
    """A newer attempt owns the stage: this worker must not write any more."""


def run_stage(job: StageJob, on_step: Callable[[int], None] | None = None) -> bool:
    """Train the stage's students to the end, or to a requested stop. True when the stage is done.

    `on_step(step)` is called after each update (for tests and profilers). Raises `UserError`, `DataError` or
    `ModelError` for what a retry can't cure.
    """
    with join_world(job.device, job.threads) as world:
        run = StageRun(job, world)
        try:
            return run.run(on_step)
        except (UserError, DataError, ModelError, OSError):
            run.end_attempt()  # the cause is known: nothing to count
            raise
        finally:
            run.close()


@dataclass
class Clock:
    """Throughput since the last reading, and when the next heartbeat, stop check and checkpoint are due."""

    checkpoint_every_seconds: float
    heartbeat: float = 0.0
    stop_check: float = 0.0
    checkpoint: float = field(default_factory=time.monotonic)
    reading: float = field(default_factory=time.monotonic)
    reading_step: int = 0
    waited: float = 0.0  # seconds for rows since the last reading

    def due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - getattr(self, what) < seconds:
            return False
        setattr(self, what, now)
        return True

    def restart(self, step: int) -> None:
        self.reading, self.reading_step, self.waited = time.monotonic(), step, 0.0

    def read(self, step: int) -> tuple[float, float]:
        """Steps a second, and the share of the time that was spent waiting for rows, since the last reading."""
        seconds = max(time.monotonic() - self.reading, 1e-9)
        rates = (step - self.reading_step) / seconds, self.waited / seconds
        self.restart(step)
        return rates


class StageRun:
    def __init__(self, job: StageJob, world: World):
        self.job, self.world = job, world
        self.folder = StageFolder(Path(job.folder))
        self.autocast = pick_precision(job.precision, world.device)
        if job.reduction == "exact" and world.device.type == "cuda":
            compute_deterministically()
        self.stream = Stream(
            Path(job.data),
            seed=job.seed,
            batch=job.batch,
            micro_batch=job.micro_batch,
            pin=world.device.type == "cuda",
        )
        self.heldout = RowReader(Path(job.data) / "held-out")
        self.distiller = build_distiller(job, world.device)
        self.students = [
            StudentState(
                name,
                encoder.trained_parameters(),
                betas=job.adam_betas,
                eps=job.adam_eps,
                weight_decay=job.weight_decay,
                reduction=job.reduction,
                num_micro_batches=self.stream.num_micro_batches,
                num_terms=self.distiller.num_terms,
                on_nonfinite=job.on_nonfinite,
            )
            for name, encoder in self.distiller.students.items()
        ]
        self.models = {name: encoder.model for name, encoder in self.distiller.students.items()}
        self.identity = checkpoint.Identity(job.digest, self.stream.fingerprint)
        self.ledger = Ledger()
        self.parts = 1
        self.fixed_threads = job.reduction == "exact" and world.device.type == "cpu"
        self.clock = Clock(job.checkpoint_every_seconds)
        self.last_metrics: dict[str, float] = {}
        if not world.is_main:
            self.points = self.heldout_points = self.attempts = self.saver = None
            return
        self.points = PointLog(self.folder.points)
        self.heldout_points = PointLog(self.folder.heldout_points)
        self.attempts = Attempts(self.folder.root)
        self.expected = Expected(Path(job.data), seed=job.seed, batch=job.batch, micro_batch=job.micro_batch)
        self.saver = Saver(
            self.folder.checkpoints,
            self.models,
            self.students,
            self.identity,
            keep=job.keep_checkpoints,
            keep_every=job.keep_every_steps,
            guard=self.check_owner,
        )

    def run(self, on_step: Callable[[int], None] | None) -> bool:
        job, world = self.job, self.world
        first = self.resume()
        if first == 0:
            self.evaluate(0)
        mine = share(self.stream.num_micro_batches, world.rank, world.size)
        batches = self.stream.iterate(first, job.steps, mine)
        self.clock.restart(first)
        try:
            for step in range(first, job.steps):
                if self.attempts:
                    self.attempts.reach(step)
                outcome = self.train(step, self.rows_of_step(batches, mine))
                done = step + 1
                if done % job.log_every == 0 or done == job.steps:
                    self.log_step(done, outcome)
                if done == job.steps or (job.eval_every and done % job.eval_every == 0):
                    self.evaluate(done)
                self.beat("training", done)
                stop = outcome.told[0] > 0
                self.save_if_due(done, stop)
                if on_step:
                    on_step(done)
                if stop and done < job.steps:
                    break
        finally:
            batches.close()
        if self.saver:
            self.saver.wait()
        self.end_attempt()
        if first < job.steps and done < job.steps:
            return False
        if world.is_main:
            self.finish()
        return True

    def resume(self) -> int:
        """The first step to compute: everything is as it was before it. The main rank chooses the checkpoint."""
        job, found, error = self.job, None, None
        first = threads = 0
        if self.world.is_main:
            try:
                found = checkpoint.restore_newest(
                    self.folder.checkpoints, self.models, self.students, self.identity
                )
                first = found[0] if found else 0
                self.check_progress(first)
            except Exception as problem:  # the others must hear of it before it is raised
                error = problem
            threads = self.agree_on_threads(found[1].threads if found else None)
        failed, first, threads, exists = self.world.from_main(
            [error is not None, first, threads, bool(found)]
        )
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("the main rank cannot resume, and says why")
        if self.fixed_threads:
            torch.set_num_threads(threads)
        if exists:
            facts = (
                found[1]
                if found
                else checkpoint.restore_step(self.folder.checkpoints, first, self.models, self.students)
            )
            self.parts = facts.parts
            self.ledger.running = int(facts.ledger["digest"], 16)
        if self.world.is_main:
            log.info("stage %s: %s", job.stage, f"resumes at step {first}" if exists else "starts")
        return first

    def agree_on_threads(self, before: int | None) -> int:
        """CPU threads of every worker. Kernels split their sums by it, so exact runs keep to what they began with."""
        wanted = torch.get_num_threads()
        if not self.fixed_threads or before in (None, wanted):
            return wanted
        if self.job.threads is None:
            log.info("goes on with %d CPU threads a worker, as it began: reduction is exact", before)
            return before
        log.warning(
            "compute.threads is %d and was %d before: the weights will not be bit-identical to those of a run "
            "with one number throughout",
            wanted,
            before,
        )
        return wanted

    def check_progress(self, first: int) -> None:
        assert self.attempts
        step = self.attempts.begin(first)
        if step is not None:
            raise NoProgress(
                f"stage {self.job.stage}: {MAX_FAILURES} attempts in a row ended while they computed step {step}, of "
                f"{self.name_rows(step)}; look at worker-*.log in {self.folder.root}; the same command tries again"
            )

    def rows_of_step(self, batches: Iterator[Batch], mine: range) -> Iterator[MicroBatch]:
        """This worker's micro-batches of the next step, each noted in the ledger."""
        for index in mine:
            start = time.perf_counter()
            batch = next(batches)
            self.clock.waited += time.perf_counter() - start
            self.ledger.take(batch)
            yield index, batch.input_ids, batch.mask

    def train(self, step: int, micro_batches: Iterator[MicroBatch]) -> StepOutcome:
        try:
            outcome = train_step(
                self.distiller,
                self.students,
                micro_batches,
                step=step,
                seed=self.job.seed,
                learning_rate=self.rate(step),
                max_gradient_norm=self.job.max_gradient_norm,
                autocast=self.autocast,
                world=self.world,
                seq_len=self.stream.corpora[0].rows.seq_len,
                tell=self.tell,
                parts=self.parts,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"stage {self.job.stage}: out of memory at step {step}, even with half a micro-batch "
                f"({self.job.micro_batch // 2} rows) at once; lower micro_batch (now {self.job.micro_batch})"
            ) from error
        self.parts = outcome.parts
        _, failed, *limbs = outcome.told
        if failed:
            if self.saver:
                self.saver.wait()
            raise PeerFailed("the main rank could not save, and says why")
        self.ledger.close_step(step, limbs)
        return outcome

    def tell(self) -> list[int]:
        """To be added over ranks with the step: is a stop requested, did the last save fail, the rows' digest."""
        failed = self.saver is not None and self.saver.failed
        return [self.stop_requested(), failed, *self.ledger.own()]

    def name_rows(self, step: int) -> str:
        """The rows of a step, in words; all of them go into `failed-step.json`."""
        rows = [int(r) for i in range(self.stream.num_micro_batches) for r in self.stream.row_ids(step, i)]
        if self.world.is_main:
            write_json(self.folder.failed_step, {"step": step, "row_ids": rows})
        named = ", ".join(map(str, rows[:NAMED_ROWS]))
        more = f", … ({len(rows)} rows, all in {self.folder.failed_step})" if len(rows) > NAMED_ROWS else ""
        return f"rows {named}{more}"

    def rate(self, step: int) -> float:
        job = self.job
        return learning_rate(step, peak=job.peak_lr, warmup_steps=job.warmup_steps, num_steps=job.steps)

    def stop_requested(self) -> bool:
        return self.clock.due("stop_check", STOP_CHECK_SECONDS) and self.folder.stop_request.exists()

    def log_step(self, step: int, outcome: StepOutcome) -> None:
        """One point: this step's loss terms, rate, norms, and the speed since the last point. Syncs with the device."""
        weights = self.distiller.weights.tolist()
        metrics = {"learning_rate": self.rate(step - 1)}
        rows = zip(self.students, outcome.terms.tolist(), outcome.norms.tolist(), strict=True)
        for student, means, norm in rows:
            refused = student.refused.tolist()
            self.check_finite(student.name, *refused)
            metrics[f"{student.name}/loss"] = sum(w * m for w, m in zip(weights, means, strict=True))
            for term, mean in zip(self.distiller.term_names, means, strict=True):
                metrics[f"{student.name}/{term}"] = mean
            metrics[f"{student.name}/gradient_norm"] = norm
            if self.job.on_nonfinite == "skip":
                metrics[f"{student.name}/skipped_steps"] = refused[0]
        steps_per_second, metrics["input_wait_share"] = self.clock.read(step)
        metrics["rows_per_second"] = steps_per_second * self.job.batch
        metrics["tokens_per_second"] = metrics["rows_per_second"] * self.stream.corpora[0].rows.seq_len
        self.last_metrics = metrics
        if self.points:
            self.points.append(step, metrics)

    def check_finite(self, student: str, count: int, step: int, stopped: int) -> None:
        """Raise `UserError` when a student has come to a stop, or skipped more updates than it may."""
        job = self.job
        if not stopped and count <= job.max_skipped_steps:
            return
        what = f"stage {job.stage}: the loss or gradient of student {student} is not finite at step {step}"
        if not stopped:
            what += (
                f", and {count} updates were skipped (compute.max_skipped_steps is {job.max_skipped_steps})"
            )
        raise UserError(
            f"{what}, of {self.name_rows(step)}; no weight has moved by it; lower peak_lr (now {job.peak_lr}) or set "
            f"max_gradient_norm; where only these rows are at fault, compute.on_nonfinite=skip leaves such updates "
            f"out; the same command goes on from the last checkpoint"
        )

    def evaluate(self, step: int) -> None:
        self.beat("evaluating", step, force=True)
        divergence = heldout_divergence(
            self.distiller,
            self.heldout,
            rows=self.job.held_out_rows,
            micro_batch=self.job.micro_batch,
            autocast=self.autocast,
            world=self.world,
        )
        if self.heldout_points:
            self.heldout_points.append(
                step, {f"{s}/heldout/{t}": v for s, terms in divergence.items() for t, v in terms.items()}
            )
        self.clock.restart(step)

    def beat(self, doing: str, step: int, *, force: bool = False) -> None:
        if self.world.is_main and (self.clock.due("heartbeat", HEARTBEAT_SECONDS) or force):
            beat = {
                "doing": doing,
                "step": step,
                "time": time.time(),
                "pid": os.getpid(),
                "metrics": self.last_metrics,
            }
            write_json(self.folder.heartbeat, beat, durable=False)

    def save_if_due(self, done: int, stop: bool) -> None:
        """Begin a checkpoint by step count, before a stop and at the end; by the clock when none is in flight."""
        if not self.saver:
            return
        job = self.job
        by_count = job.checkpoint_every_steps is not None and done % job.checkpoint_every_steps == 0
        kept = job.keep_every_steps is not None and done % job.keep_every_steps == 0
        by_clock = not self.saver.busy and self.clock.due("checkpoint", job.checkpoint_every_seconds)
        if not (stop or by_count or kept or by_clock or done == job.steps):
            return
        self.clock.checkpoint = time.monotonic()
        ledger = {"digest": f"{self.ledger.running:032x}", "seed": job.seed, "batch": job.batch}
        steps = self.ledger.cut()

        def check(copy: Parts) -> None:
            for student in self.students:
                self.check_finite(student.name, *copy[f"{student.name}.optimizer"]["refused"].tolist())
            self.check_owner()
            self.expected.check(steps)

        self.saver.save(done, checkpoint.Facts(ledger, torch.get_num_threads(), self.parts), check)

    def check_owner(self) -> None:
        owner = read_json(self.folder.owner)
        if owner is not None and owner["attempt"] != self.job.attempt:
            raise Superseded(f"stage {self.job.stage} is now written by attempt {owner['attempt']}")

    def end_attempt(self) -> None:
        """This attempt ends in good order."""
        if self.attempts:
            with suppress(OSError):  # on a full disk the count stays as it was
                self.attempts.end()

    def close(self) -> None:
        """Leave nothing running and no file open."""
        if self.saver:
            self.saver.close()
        for file in (self.points, self.heldout_points, self.attempts):
            if file:
                file.close()

    def finish(self) -> None:
        """Export every student and write `done.json` last."""
        self.beat("exporting", self.job.steps, force=True)
        self.check_owner()
        digests = {}
        for student in self.job.students:
            encoder = self.distiller.students[student.name]
            folder = self.folder.student(student.name)
            card = model_card(
                student.name,
                encoder.model,
                trained=encoder.trained_parameters(),
                teacher=f"{self.job.teacher_name}, layer {self.job.teacher_layer}",
                facts={
                    "Objective": self.job.objective["name"],
                    "Steps": f"{self.job.steps:,} of {self.job.batch} rows x {self.stream.manifest.seq_len} tokens",
                    "Peak learning rate": f"{self.job.peak_lr:g}",
                },
            )
            export_student(encoder.model, Path(self.job.data) / "tokenizer", folder, card)
            digests[student.name] = weights_digest(folder)
        write_json(
            self.folder.done,
            {
                "digest": self.job.digest,
                "data": self.identity.data,
                "students": digests,
                "steps": self.job.steps,
                "ledger": f"{self.ledger.running:032x}",
            },
        )


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for float32 throughout. `auto`: bfloat16 on a GPU that has it."""
    if precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    ):
        return torch.bfloat16
    return None


def compute_deterministically() -> None:
    """Before the first kernel on a GPU: let torch pick those that add in a fixed order; it warns where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_distiller(job: StageJob, device: torch.device) -> Distiller:
    """The frozen teacher and the freshly initialised students of a stage, on the device."""
    teacher = load_encoder(job.teacher, layer=job.teacher_layer).to(device)
    students = {}
    for student in job.students:
        model = build_student(
            teacher.model.config,
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            dropout=student.dropout,
            seed=derive_seed(job.seed, "init", student.name),
        )
        students[student.name] = TappedEncoder(model, student.layers).to(device)
    distiller = Distiller(teacher, students, Objective.named(**job.objective))
    distiller.train()
    return distiller


def log_to_file(job: StageJob) -> None:
    """Send this worker's log to `worker-<rank>.log` in the stage's folder, where the driver points people to."""
    rank = os.environ.get("RANK", "0")
    handler = logging.FileHandler(Path(job.folder) / f"worker-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def run_reporting(job: StageJob, on_step: Callable[[int], None] | None = None) -> bool:
    """`run_stage`, with errors that no retry can cure left in `failure.json` for the driver instead of raised.

    Started again by a supervisor after such an error, it returns at once.
    """
    failure = StageFolder(Path(job.folder)).failure
    if reported(job):
        return False
    try:
        return run_stage(job, on_step)
    except (UserError, DataError, ModelError) as error:
        message, exit_code = str(error), getattr(error, "exit_code", UserError.exit_code)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        exit_code = UserError.exit_code
        message = (
            f"stage {job.stage}: no space left on the disk of {job.folder}; its last checkpoint is whole: free some "
            f"space and run the same command again"
        )
    except (PeerFailed, RuntimeError):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        deadline = time.monotonic() + PEER_REPORT_SECONDS
        while not reported(job):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        return False
    write_json(failure, {"attempt": job.attempt, "message": message, "exit_code": exit_code})
    return False


def reported(job: StageJob) -> bool:
    """Has a worker of this attempt left an error that no retry can cure?"""
    failure = read_json(StageFolder(Path(job.folder)).failure)
    return failure is not None and failure["attempt"] == job.attempt


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m orchestrator.worker JOB.json", file=sys.stderr)
        return 2
    try:
        return 0 if run_stage(StageJob.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))) else 3
    except PeerFailed as error:
        print(f"minilm: stopped: {error}", file=sys.stderr)
        return UserError.exit_code
    except (UserError, DataError, ModelError, OSError, json.JSONDecodeError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
