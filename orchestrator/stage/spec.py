"""One stage as plain values: everything a worker needs, and where it writes.

A `StageSpec` is made from the recipe by `curriculum`, travels to the workers as JSON and is kept beside the
stage's output, so that `python -m minilm.orchestrator.worker STAGE.json` (also under torchrun) repeats what Ray
started.
Invariant: `digest` covers all that determines the weights but for rounding (workers, threads, `reduction`) and for
what happens after a number that is not finite, so that either may change between two attempts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from minilm.orchestrator.stage.data import DataSpec


@dataclass(frozen=True)
class StudentSpec:
    """Size and initialisation of one student."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    dropout: float
    init: str


@dataclass(frozen=True)
class StageSpec:
    """One teacher, its students, and how they are trained. Paths are absolute and seen by every node.

    attempt: a fresh name each time a driver starts the stage. lease: the driver's file in `WORKDIR/lease`, "" where
    none watches over the workers.
    checkpoints: a folder or URL of this stage's own; None for `StageFolder.checkpoints`.
    """

    stage: str
    folder: str
    data: DataSpec
    teacher: str
    teacher_name: str
    teacher_digest: str
    teacher_layer: int | str
    students: tuple[StudentSpec, ...]
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
    def from_json(cls, text: str) -> StageSpec:
        values = json.loads(text)
        values["data"] = DataSpec.from_values(values["data"])
        values["students"] = tuple(StudentSpec(**s) for s in values["students"])
        values["adam_betas"] = tuple(values["adam_betas"])
        return cls(**values)
