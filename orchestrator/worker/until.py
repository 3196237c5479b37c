"""When a stage is good enough (`until` in a recipe), and at how many steps it then ends.

A pure function of the points of the held-out log, so the same for any number of workers. Rank 0 keeps the points: those
of the log, and, where the work directory is a new one, those that the checkpoint brings along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from minilm.orchestrator.evaluation.probes.catalogue import DIVERGENCE, PROBES
from minilm.orchestrator.evaluation.probes.evaluator import metric_of, share_of
from minilm.orchestrator.stage.metrics_file import Point
from minilm.orchestrator.stage.spec import StageSpec

Points = Mapping[int, Mapping[str, float]]  # by step


def num_steps(spec: StageSpec, points: Points) -> int:
    """The steps of the stage as far as `points` say: with a condition that is met, those up to there and the decay."""
    decay, met = spec.learning_rate.decay_steps or 0, met_at(spec, points)
    return spec.steps if met is None else min(spec.steps, met + decay)


def met_at(spec: StageSpec, points: Points) -> int | None:
    """The first measurement after the warm-up at which every student is good enough, None before."""
    until = spec.until
    assert until is not None
    best: dict[str, float] = {}
    without_gain: dict[str, int] = {}
    sign = 1 if PROBES[until.probe].higher_is_better else -1
    for step in sorted(points):
        if step < max(1, spec.learning_rate.warmup_steps):
            continue
        enough = []
        for student in spec.students:
            name, metrics = student.name, points[step]
            value = sign * value_of(metrics, name, until.probe)
            least = best.get(name, -math.inf)
            if gained := value > least + (until.min_gain * abs(least) if name in best else 0.0):
                best[name] = value
            without_gain[name] = 0 if gained else without_gain.get(name, 0) + 1
            share = metrics.get(f"{name}/heldout/{share_of(until.probe)}", math.nan)
            enough.append(
                (until.share_of_teacher is not None and share >= until.share_of_teacher)
                or (until.patience is not None and without_gain[name] >= until.patience)
            )
        if all(enough):
            return step
    return None


def value_of(metrics: Mapping[str, float], student: str, probe: str) -> float:
    """A probe's value in a point; the divergence's is the sum of its terms. NaN where it has none."""
    prefix = f"{student}/heldout/"
    if probe != DIVERGENCE:
        return metrics.get(prefix + metric_of(probe), math.nan)
    terms = [v for k, v in metrics.items() if k.startswith(prefix) and "/" not in k.removeprefix(prefix)]
    return sum(terms) if terms else math.nan


class UntilPoints:
    """The points that `until` is decided from; on rank 0."""

    def __init__(self, spec: StageSpec):
        self.spec = spec
        self.points: dict[int, dict[str, float]] = {}

    def restore(self, saved: Mapping[str, Mapping[str, float]], log: Iterable[Point]) -> None:
        """Begin an attempt with a checkpoint's points and the log's, which are right where both have one."""
        for step, metrics in saved.items():
            self.take(int(step), metrics)
        for point in log:
            self.take(point.step, point.metrics, replace=True)

    def take(self, step: int, metrics: Mapping[str, float], *, replace: bool = False) -> None:
        """A measurement; of a step that was measured before, the first one counts, as in the log."""
        until = self.spec.until
        if until is None or step % until.every:
            return
        probe = until.probe
        own = {k: v for k, v in metrics.items() if probe == DIVERGENCE or f"/{metric_of(probe)}" in k}
        if own and (replace or step not in self.points):
            self.points[step] = own

    def num_steps(self) -> int:
        return num_steps(self.spec, self.points) if self.spec.until else self.spec.steps

    def saved(self) -> dict[str, dict[str, float]]:
        """For a checkpoint."""
        return {str(step): metrics for step, metrics in self.points.items()}
