"""The gate before an alias moves: what recorded scores have to hold, line by line.

A line has the words of MLflow's `MetricThreshold`: it holds where the value of its metric reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minilm.orchestrator.evaluation.comparison import Score, share_of

DIGITS = 9  # of the numbers that are compared: a drop of just as much as is allowed is allowed


@dataclass(frozen=True)
class Gate:
    """tasks: that must have been run. min_share_of_teacher: of its score that must be kept on each, None for no such
    demand. max_drop: by how much each score may lie below that of the version which the alias names now."""

    tasks: tuple[str, ...]
    min_share_of_teacher: float | None = None
    max_drop: float = 0.0


@dataclass(frozen=True)
class Line:
    """One demand: the sentence that says with its numbers whether it holds. value, threshold: None where there is no
    result to compare."""

    text: str
    metric: str
    value: float | None = None
    threshold: float | None = None

    @property
    def holds(self) -> bool:
        return self.value is not None and self.threshold is not None and self.value >= self.threshold

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"greater_is_better": True, "holds": self.holds}


def check_gate(
    gate: Gate, candidate: Sequence[Score], teacher: Sequence[Score] | None, current: Sequence[Score] | None
) -> list[Line]:
    """A line for each task and demand. teacher: None where no share is asked for; current: None where the alias names
    nothing yet, or the candidate itself."""
    lines = []
    for task in gate.tasks:
        own = [score for score in candidate if score.task == task]
        if not own:
            lines.append(Line(f"{task}: the candidate has no recorded result", task))
            continue
        for score in own:
            if gate.min_share_of_teacher is not None:
                lines.append(_share(score, teacher or (), gate.min_share_of_teacher))
            if current is not None:
                lines.append(_drop(score, current, gate.max_drop))
    return lines


def _same(score: Score, others: Sequence[Score]) -> Score | None:
    """The score of the same task by the same protocol, training rows and data."""
    key = (score.task, score.protocol, score.train_rows, score.data_digest)
    return next((s for s in others if (s.task, s.protocol, s.train_rows, s.data_digest) == key), None)


def metric_name(score: Score) -> str:
    """As a score is called in MLflow."""
    return f"{score.protocol}/{score.task}/{score.metric}"


def _share(score: Score, teacher: Sequence[Score], least: float) -> Line:
    what = f"{score.task} ({score.metric}, {score.protocol})"
    metric = f"{score.protocol}/{score.task}/share_of_teacher"
    other = _same(score, teacher)
    if other is None:
        return Line(f"{what}: the teacher has no recorded result by this protocol on these data", metric)
    share = share_of(other, score)
    if share is None:
        return Line(f"{what}: the teacher scores {other.mean:.4f}, of which no share can be kept", metric)
    kept = round(share.mean, DIGITS)
    return Line(
        f"{what}: {score.mean:.4f} is {kept:.1%} of the teacher's {other.mean:.4f}, "
        f"{'at least' if kept >= least else 'below'} {least:.1%}",
        metric,
        kept,
        least,
    )


def _drop(score: Score, current: Sequence[Score], most: float) -> Line:
    what, metric = f"{score.task} ({score.metric}, {score.protocol})", metric_name(score)
    other = _same(score, current)
    if other is None:
        return Line(f"{what}: the version that it would replace has no recorded result on these data", metric)
    value, least = round(score.mean, DIGITS), round(other.mean - most, DIGITS)
    return Line(
        f"{what}: {score.mean:.4f} after {other.mean:.4f}, a change of {score.mean - other.mean:+.4f}, "
        f"{'within' if value >= least else 'more than'} the drop of {most:g} that is allowed",
        metric,
        value,
        least,
    )
