"""One stage as plain values: everything a worker needs, and where it writes.

A `StageSpec` is made from the recipe by `curriculum`, travels to the workers as JSON and is kept beside the
stage's output, so that `python -m minilm.orchestrator.worker STAGE.json` (also under torchrun) repeats what Ray
started.
Invariant: `digest` covers all that determines the weights but for rounding (workers, threads, `gradient_sum`) and for
what happens after a number that is not finite, so that either may change between two attempts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from minilm.orchestrator.stage.data import DataSpec


@dataclass(frozen=True)
class StudentSpec:
    """Size and initialisation of one student.

    start: folder of the model that it goes on from, "" without one; start_digest: of its weights, or of those that it
    was made of; init: then the reference in the recipe. start_share: of the start in the weights that are
    measured and exported. positions: what becomes of those behind the rows' length.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    dropout: float
    init: str
    start: str = ""
    start_digest: str = ""
    positions: str = "cut"
    start_share: float = 0.0


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW, as in the recipe's stage."""

    adam_betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    max_gradient_norm: float | None


@dataclass(frozen=True)
class LearningRateSpec:
    """The learning rate by step, as in the recipe's stage."""

    peak_lr: float
    warmup_steps: int
    schedule: str
    decay_steps: int | None = None


@dataclass(frozen=True)
class CheckpointPolicy:
    """When checkpoints are made and which ones stay, as in the recipe's `compute`."""

    checkpoint_every_steps: int | None
    checkpoint_every_seconds: float
    keep_checkpoints: int
    keep_every_steps: int | None


@dataclass(frozen=True)
class MeasuringSpec:
    """What is measured on held-out rows, and logged, and how often: keys of the recipe's stage and `tracking`."""

    eval_every: int | None
    held_out_rows: int
    log_every: int
    per_head: bool


@dataclass(frozen=True)
class RuntimeSpec:
    """Where and how a worker computes, as in the recipe's `compute`."""

    device: str
    precision: str
    threads: int | None
    gradient_sum: str
    on_nonfinite: str
    max_skipped_steps: int
    stall_seconds: float


@dataclass(frozen=True)
class ProbeSpec:
    """A probe and after how many steps it measures each time (None: before and after only). data: the folder that holds
    its task's folder, or of a data set whose held-out rows it reads; "" for one that reads the stage's own."""

    probe: str
    every: int | None = None
    data: str = ""


@dataclass(frozen=True)
class UntilSpec:
    """When a stage is good enough, as in the recipe's stage. every: steps between the probe's measurements."""

    probe: str
    every: int
    share_of_teacher: float | None = None
    patience: int | None = None
    min_gain: float = 0.01


GROUPS: dict[str, type[Any]] = {
    "optimizer": OptimizerSpec,
    "learning_rate": LearningRateSpec,
    "checkpoint_policy": CheckpointPolicy,
    "measuring": MeasuringSpec,
    "runtime": RuntimeSpec,
}


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a `StageSpec` by name, from the values of a recipe's sections by key; other keys are left out."""
    return {
        name: kind(**{field.name: values[field.name] for field in fields(kind)})
        for name, kind in GROUPS.items()
    }


@dataclass(frozen=True)
class StageSpec:
    """One teacher, its students, and how they are trained. Paths are absolute and seen by every node.

    steps: with `until` the most that are made. trunk: the digest of all that determines the steps before a decay, ""
    where the rates depend on `steps`.

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
    optimizer: OptimizerSpec
    learning_rate: LearningRateSpec
    checkpoint_policy: CheckpointPolicy
    measuring: MeasuringSpec
    runtime: RuntimeSpec
    checkpoints: str | None
    digest: str
    attempt: str = "inline"
    lease: str = ""
    trunk: str = ""
    evaluate: tuple[ProbeSpec, ...] = ()
    until: UntilSpec | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"data": self.data.to_values()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> StageSpec:
        values = json.loads(text)
        values["data"] = DataSpec.from_values(values["data"])
        values["students"] = tuple(StudentSpec(**s) for s in values["students"])
        values["evaluate"] = tuple(ProbeSpec(**probe) for probe in values.get("evaluate", ()))
        values["until"] = UntilSpec(**values["until"]) if values.get("until") else None
        for name, kind in GROUPS.items():
            values[name] = kind(**values[name])
        betas = tuple(values["optimizer"].adam_betas)  # a list in JSON
        values["optimizer"] = replace(values["optimizer"], adam_betas=betas)
        return cls(**values)
