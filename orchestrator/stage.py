"""One stage as plain values: everything a worker needs, and where it writes.

A `StageJob` is made from the recipe by `curriculum`, travels to the workers as JSON and is kept beside the
stage's output, so that `python -m orchestrator.worker JOB.json` (also under torchrun) repeats what Ray started.
Invariant: `digest` covers all that determines the weights but for rounding (workers, threads, `reduction`) and for
what happens after a number that is not finite, so that either may change between two attempts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.data_job import DataJob


@dataclass(frozen=True)
class StudentJob:
    """Size and initialisation of one student."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    dropout: float
    init: str


@dataclass(frozen=True)
class StageJob:
    """One teacher, its students, and how they are trained. Paths are absolute and seen by every node.

    attempt: a fresh name each time a driver starts the stage. lease: the driver's file in `WORKDIR/lease`, "" where
    none watches over the workers.
    checkpoints: a folder or URL of this stage's own; None for `StageFolder.checkpoints`.
    """

    stage: str
    folder: str
    data: DataJob
    teacher: str
    teacher_name: str
    teacher_digest: str
    teacher_layer: int | str
    students: tuple[StudentJob, ...]
    objective: dict[str, Any]
    seed: int
    batch: int
    micro_batch: int
    steps: int
    peak_lr: float
    warmup_steps: int
    schedule: str
    adam_betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    max_gradient_norm: float | None
    eval_every: int | None
    held_out_rows: int
    log_every: int
    per_head: bool
    device: str
    precision: str
    threads: int | None
    checkpoint_every_steps: int | None
    checkpoint_every_seconds: float
    keep_checkpoints: int
    keep_every_steps: int | None
    checkpoints: str | None
    reduction: str
    on_nonfinite: str
    max_skipped_steps: int
    stall_seconds: float
    digest: str
    attempt: str = "inline"
    lease: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"data": self.data.to_values()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> StageJob:
        values = json.loads(text)
        values["data"] = DataJob.from_values(values["data"])
        values["students"] = tuple(StudentJob(**s) for s in values["students"])
        values["adam_betas"] = tuple(values["adam_betas"])
        return cls(**values)


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage in the work directory."""

    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, or room to work in for a store that is elsewhere."""
        return self.root / "checkpoints"

    @property
    def points(self) -> Path:
        """Loss terms and speeds by step (JSON lines, append-only)."""
        return self.root / "metrics.jsonl"

    @property
    def heldout_points(self) -> Path:
        return self.root / "heldout.jsonl"

    @property
    def heartbeat(self) -> Path:
        """What rank 0 is doing now; replaced about once a second."""
        return self.root / "heartbeat.json"

    @property
    def stop_request(self) -> Path:
        """Created by the driver: checkpoint at the next step boundary and return."""
        return self.root / "stop"

    @property
    def failure(self) -> Path:
        """A worker's one-line error that no retry can cure."""
        return self.root / "failure.json"

    def worker_log(self, rank: int) -> Path:
        return self.root / f"worker-{rank}.log"

    @property
    def failed_step(self) -> Path:
        """The rows of the step that an error is about."""
        return self.root / "failed-step.json"

    @property
    def done(self) -> Path:
        return self.root / "done.json"

    @property
    def published(self) -> Path:
        """Registered and described: nothing is left to do for this stage."""
        return self.root / "published.json"

    def student(self, name: str) -> Path:
        """The exported `transformers` folder of a student."""
        return self.root / "students" / name
