"""The loop of one stage on one worker: build, resume, train, export. Imports neither Ray nor MLflow.

Every worker runs the same code; rank 0 alone writes. Resuming looks, in this order, at the stage's own newest sound
checkpoint, then at the initialisation that the recipe asks for. The step number is the data position.

`python -m orchestrator.worker JOB.json` runs a stage without any launcher, alone or under torchrun.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from data.errors import DataError
from data.stream import RowReader, Stream, share
from model.distiller import Distiller
from model.encoder import TappedEncoder, build_student, load_encoder
from model.errors import ModelError
from model.export import export_student, model_card, weights_digest
from model.objective import Objective
from orchestrator import checkpoint
from orchestrator.errors import UserError
from orchestrator.evaluate import heldout_divergence
from orchestrator.files import read_json, write_json
from orchestrator.metrics import PointLog
from orchestrator.schedule import learning_rate
from orchestrator.stage import StageFolder, StageJob
from orchestrator.step import StudentState, derive_seed, train_step
from orchestrator.world import World, join_world

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
STOP_CHECK_SECONDS = 0.5


class Superseded(Exception):
    """A newer attempt owns the stage: this worker must not write any more."""


def run_stage(job: StageJob, on_step: Callable[[int], None] | None = None) -> bool:
    """Train the stage's students to the end, or to a requested stop. True when the stage is done.

    `on_step(step)` is called after each update (for tests and profilers). Raises `UserError`, `DataError` or
    `ModelError` for what a retry can't cure.
    """
    with join_world(job.device, job.threads) as world:
        return StageRun(job, world).run(on_step)


@dataclass
class Clock:
    """Throughput since the last reading, and when the next heartbeat, stop check and checkpoint are due."""

    checkpoint_every_seconds: float
    heartbeat: float = 0.0
    stop_check: float = 0.0
    checkpoint: float = field(default_factory=time.monotonic)
    reading: float = field(default_factory=time.monotonic)
    reading_step: int = 0

    def due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - getattr(self, what) < seconds:
            return False
        setattr(self, what, now)
        return True

    def steps_per_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self.reading_step) / max(now - self.reading, 1e-9)
        self.reading, self.reading_step = now, step
        return rate


class StageRun:
    def __init__(self, job: StageJob, world: World):
        self.job, self.world = job, world
        self.folder = StageFolder(Path(job.folder))
        self.autocast = pick_precision(job.precision, world.device)
        self.stream = Stream(Path(job.data), seed=job.seed, batch=job.batch, micro_batch=job.micro_batch)
        self.heldout = RowReader(Path(job.data) / "held-out")
        self.distiller = build_distiller(job, world.device)
        self.students = [
            StudentState(
                name,
                encoder.trained_parameters(),
                betas=job.adam_betas,
                eps=job.adam_eps,
                weight_decay=job.weight_decay,
            )
            for name, encoder in self.distiller.students.items()
        ]
        self.identity = checkpoint.Identity(job.digest, self.stream.manifest.fingerprint)
        self.points = PointLog(self.folder.points) if world.is_main else None
        self.heldout_points = PointLog(self.folder.heldout_points) if world.is_main else None
        self.clock = Clock(job.checkpoint_every_seconds)
        self.last_metrics: dict[str, float] = {}

    def run(self, on_step: Callable[[int], None] | None) -> bool:
        job, world = self.job, self.world
        models = {name: encoder.model for name, encoder in self.distiller.students.items()}
        restored = checkpoint.restore_newest(self.folder.checkpoints, models, self.students, self.identity)
        first = restored or 0
        if world.is_main:
            log.info("stage %s: %s", job.stage, f"resumes at step {first}" if restored else "starts")
        if restored is None:
            self.evaluate(0)
        mine = share(self.stream.num_micro_batches, world.rank, world.size)
        batches = self.stream.iterate(first, job.steps, mine)
        self.clock.reading_step, self.clock.reading = first, time.monotonic()
        try:
            for step in range(first, job.steps):
                outcome = train_step(
                    self.distiller,
                    self.students,
                    ((i, b.input_ids, b.mask) for i, b in zip(mine, islice(batches, len(mine)), strict=True)),
                    step=step,
                    seed=job.seed,
                    learning_rate=self.rate(step),
                    max_gradient_norm=job.max_gradient_norm,
                    autocast=self.autocast,
                    stop=self.stop_requested(),
                    world=world,
                )
                done = step + 1
                if done % job.log_every == 0 or done == job.steps:
                    self.log_step(done, outcome.terms, outcome.norms, outcome.count)
                if done == job.steps or (job.eval_every and done % job.eval_every == 0):
                    self.evaluate(done)
                self.beat("training", done)
                if outcome.stop or self.checkpoint_due(done):
                    self.save(done)
                if on_step:
                    on_step(done)
                if outcome.stop and done < job.steps:
                    return False
        finally:
            batches.close()
        if world.is_main:
            self.finish()
        return True

    def rate(self, step: int) -> float:
        job = self.job
        return learning_rate(step, peak=job.peak_lr, warmup_steps=job.warmup_steps, num_steps=job.steps)

    def stop_requested(self) -> bool:
        return self.clock.due("stop_check", STOP_CHECK_SECONDS) and self.folder.stop_request.exists()

    def log_step(self, step: int, terms: torch.Tensor, norms: torch.Tensor, count: float) -> None:
        """One point: this step's loss terms, rate, norms and the speed since the last point. Syncs with the device."""
        totals = self.world.sum_host(terms.double().flatten().tolist())
        weights = self.distiller.weights.tolist()
        width = self.distiller.num_terms
        metrics = {"learning_rate": self.rate(step - 1)}
        for row, (student, norm) in enumerate(zip(self.students, norms.tolist(), strict=True)):
            means = [total / count for total in totals[row * width : (row + 1) * width]]
            metrics[f"{student.name}/loss"] = sum(w * m for w, m in zip(weights, means, strict=True))
            for term, mean in zip(self.distiller.term_names, means, strict=True):
                metrics[f"{student.name}/{term}"] = mean
            metrics[f"{student.name}/gradient_norm"] = norm
            if not (math.isfinite(norm) and math.isfinite(metrics[f"{student.name}/loss"])):
                raise UserError(
                    f"stage {self.job.stage}: the loss or gradient of student {student.name} is not finite at step "
                    f"{step}; lower peak_lr (now {self.job.peak_lr}) or set max_gradient_norm, and run again: "
                    f"it resumes from the last checkpoint"
                )
        steps_per_second = self.clock.steps_per_second(step)
        metrics["rows_per_second"] = steps_per_second * self.job.batch
        metrics["tokens_per_second"] = metrics["rows_per_second"] * self.stream.manifest.seq_len
        self.last_metrics = metrics
        if self.points:
            self.points.append(step, metrics)

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
        self.clock.reading, self.clock.reading_step = time.monotonic(), step

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

    def checkpoint_due(self, done: int) -> bool:
        job = self.job
        by_steps = job.checkpoint_every_steps is not None and done % job.checkpoint_every_steps == 0
        return done == job.steps or by_steps or self.clock.due("checkpoint", job.checkpoint_every_seconds)

    def save(self, step: int) -> None:
        if not self.world.is_main:
            return
        for student in self.students:
            if not torch.isfinite(student.gradient).all():
                raise UserError(
                    f"stage {self.job.stage}: the gradient of student {student.name} is not finite at step {step}; "
                    f"nothing was saved; lower peak_lr (now {self.job.peak_lr}) and run again"
                )
        self.check_owner()
        checkpoint.save(
            self.folder.checkpoints,
            step,
            {name: encoder.model.state_dict() for name, encoder in self.distiller.students.items()},
            self.students,
            self.identity,
            keep=self.job.keep_checkpoints,
        )
        self.clock.checkpoint = time.monotonic()

    def check_owner(self) -> None:
        owner = read_json(self.folder.owner)
        if owner is not None and owner["attempt"] != self.job.attempt:
            raise Superseded(f"stage {self.job.stage} is now written by attempt {owner['attempt']}")

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
            },
        )


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for float32 throughout. `auto`: bfloat16 on a GPU that has it."""
    if precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    ):
        return torch.bfloat16
    return None


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


def run_reporting(job: StageJob) -> bool:
    """`run_stage`, with errors that no retry can cure left in `failure.json` for the driver instead of raised."""
    try:
        return run_stage(job)
    except (UserError, DataError, ModelError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        message = (
            f"stage {job.stage}: no space left on the disk of {job.folder}; its last checkpoint is whole: free some "
            f"space and run the same command again"
        )
    write_json(StageFolder(Path(job.folder)).failure, {"attempt": job.attempt, "message": message})
    return False


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m orchestrator.worker JOB.json", file=sys.stderr)
        return 2
    try:
        return 0 if run_stage(StageJob.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))) else 3
    except (UserError, DataError, ModelError, OSError, json.JSONDecodeError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
