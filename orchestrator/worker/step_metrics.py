"""The numbers of one step: which steps have a point, and what stands in it. The journal writes it down."""

from __future__ import annotations

from collections.abc import Sequence

from minilm.model.distiller import Distiller
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train.lr_schedule import learning_rate
from minilm.orchestrator.train.step import StepOutcome, StudentState
from minilm.orchestrator.worker.failures import check_finite


def is_logged(spec: StageSpec, done: int) -> bool:
    """Is there a point after `done` steps?"""
    return done % spec.log_every == 0 or done == spec.steps


def rate(spec: StageSpec, step: int) -> float:
    """The learning rate of step `step` (from 0)."""
    return learning_rate(
        step,
        peak=spec.peak_lr,
        warmup_steps=spec.warmup_steps,
        num_steps=spec.steps,
        schedule=spec.schedule,
    )


def step_metrics(
    spec: StageSpec,
    distiller: Distiller,
    students: Sequence[StudentState],
    intake: RowLoader,
    step: int,
    outcome: StepOutcome,
) -> dict[str, float]:
    """Loss terms, rate and norms of step `step` (from 0). Waits for the device.

    Raises `UserError` where they are not finite and the run may not go on (`check_finite`).
    """
    weights = distiller.weights.tolist()
    metrics = {"learning_rate": rate(spec, step)} | intake.metrics()
    heads = outcome.heads.tolist() if spec.per_head else []
    for student, values in zip(students, heads, strict=False):
        metrics |= head_metrics(student.name, distiller.objective.relation_names, values)
    rows = zip(students, outcome.terms.tolist(), outcome.norms.tolist(), strict=True)
    for student, means, norm in rows:
        skipped = student.skipped.tolist()
        check_finite(spec, intake.stream, student.name, skipped)
        metrics |= student_metrics(student.name, distiller.term_names, weights, means, norm)
        if spec.on_nonfinite == "skip":
            metrics[f"{student.name}/skipped_steps"] = skipped[0]
    return metrics


def head_metrics(name: str, relations: Sequence[str], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """A student's relations by head; values: [relations, heads]."""
    return {
        f"{name}/{relation}/head-{head:02d}": value
        for relation, heads in zip(relations, values, strict=True)
        for head, value in enumerate(heads, start=1)
    }


def student_metrics(
    name: str, term_names: Sequence[str], weights: Sequence[float], means: Sequence[float], norm: float
) -> dict[str, float]:
    """A student's numbers of one step: its loss, the terms that it is the weighted sum of, the gradient's norm."""
    loss = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    terms = {f"{name}/{term}": mean for term, mean in zip(term_names, means, strict=True)}
    return {f"{name}/loss": loss, **terms, f"{name}/gradient_norm": norm}
