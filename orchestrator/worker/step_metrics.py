"""The metrics logged for one step, and which steps are logged. `MetricLogger` writes them."""

from __future__ import annotations

from collections.abc import Sequence

from minilm.model.distiller import Distiller
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train.lr_schedule import learning_rate
from minilm.orchestrator.train.step import StepOutcome, StudentState
from minilm.orchestrator.worker.failures import check_finite


def is_logged(spec: StageSpec, done: int) -> bool:
    """True if metrics are logged after `done` steps: where the stage ends, or may turn out to end, they are."""
    may_end = spec.until is not None and done % spec.until.every == 0
    return done % spec.measuring.log_every == 0 or done == spec.steps or may_end


def rate(spec: StageSpec, step: int) -> float:
    """The learning rate of step `step` (from 0)."""
    return learning_rate(
        step,
        peak=spec.learning_rate.peak_lr,
        warmup_steps=spec.learning_rate.warmup_steps,
        num_steps=spec.steps,
        schedule=spec.learning_rate.schedule,
        decay_steps=spec.learning_rate.decay_steps,
    )


def step_metrics(
    spec: StageSpec,
    distiller: Distiller,
    students: Sequence[StudentState],
    row_loader: RowLoader,
    step: int,
    outcome: StepOutcome,
) -> dict[str, float]:
    """Learning rate, loss terms and gradient norms of step `step` (from 0). Waits for the device.

    Raises `UserError` if an update was not finite and the run may not go on (`check_finite`).
    """
    weights = distiller.weights.tolist()
    metrics = {"learning_rate": rate(spec, step)} | row_loader.metrics()
    heads = outcome.heads.tolist() if spec.measuring.per_head else []
    for student, values in zip(students, heads, strict=False):
        metrics |= head_metrics(student.name, distiller.objective.relation_names, values)
    rows = zip(students, outcome.terms.tolist(), outcome.norms.tolist(), strict=True)
    for student, means, norm in rows:
        skipped = student.skipped.tolist()
        check_finite(spec, row_loader.stream, student.name, skipped)
        metrics |= student_metrics(student.name, distiller.term_names, weights, means, norm)
        if spec.runtime.on_nonfinite == "skip":
            metrics[f"{student.name}/skipped_steps"] = skipped[0]
    return metrics


def head_metrics(name: str, relations: Sequence[str], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """A student's relations by head, as NAME/RELATION/head-01 and so on. values: [relations, heads]."""
    return {
        f"{name}/{relation}/head-{head:02d}": value
        for relation, heads in zip(relations, values, strict=True)
        for head, value in enumerate(heads, start=1)
    }


def student_metrics(
    name: str, term_names: Sequence[str], weights: Sequence[float], means: Sequence[float], norm: float
) -> dict[str, float]:
    """A student's loss, the terms that the loss is the weighted sum of, and its gradient's norm."""
    loss = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    terms = {f"{name}/{term}": mean for term, mean in zip(term_names, means, strict=True)}
    return {f"{name}/loss": loss, **terms, f"{name}/gradient_norm": norm}
