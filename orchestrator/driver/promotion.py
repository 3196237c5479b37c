"""An alias moves when scores hold: the same walk at the end of a recipe and for `minilm promote`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.comparison import Score
from minilm.orchestrator.evaluation.gate import Gate, Line, check_gate, metric_name
from minilm.orchestrator.evaluation.sources import Source
from minilm.orchestrator.tracking import registry
from minilm.orchestrator.tracking.promotion import Metric, holder, record_gate, record_scores
from minilm.orchestrator.tracking.pull import pull_once
from minilm.orchestrator.tracking.registry import RegisteredModel


def compared_with(store: str, candidate: RegisteredModel, alias: str, against: str | None) -> str | None:
    """The version that a candidate for `alias` is compared with, as models:/NAME/VERSION; None where the alias names
    none yet, or the candidate itself. UserError where `against` is another alias, which there is not."""
    if against is not None and against != alias:
        version: int | None = registry.resolve(store, f"models:/{candidate.name}@{against}").version
        if version == candidate.version:
            raise UserError(
                f"models:/{candidate.name}@{against} is the candidate itself, with which nothing can be compared; give "
                f"another alias to compare with"
            )
    else:
        version = holder(store, candidate.name, alias)
    return None if version in (None, candidate.version) else f"models:/{candidate.name}/{version}"


def registered_source(store: str, uri: str, folder: Path) -> Source:
    """A registered version as a model to be scored, under its own name."""
    return Source(uri, "folder", str(pull_once(store, uri, folder)))


def pass_gate(
    store: str,
    candidate: RegisteredModel,
    gate: Gate,
    alias: str,
    *,
    own: Sequence[Score],
    teacher: Sequence[Score] | None,
    current: Sequence[Score] | None,
    force: str | None = None,
) -> list[Line]:
    """Check the scores, note them and the lines in the registry, and move the aliases: `challenger` in any case,
    `alias` where all lines hold or there is a reason to `force` it. Can be repeated."""
    lines = check_gate(gate, own, teacher, current)
    holds = all(line.holds for line in lines)
    record_scores(store, candidate, metrics_of(own))
    reason = None if holds and own else force
    record_gate(store, candidate, lines=[line.as_dict() for line in lines], reason=reason)
    if holds or force is not None:
        registry.promote(store, candidate.name, candidate.version, alias)
    return lines


def metrics_of(scores: Sequence[Score]) -> list[Metric]:
    return [Metric(metric_name(score), score.mean, score.task, score.data_digest) for score in scores]
