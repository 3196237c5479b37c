"""The gate of `minilm promote`: an alias moves when recorded scores hold, or with a reason."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import positive
from minilm.orchestrator.verbs.evaluate import DEFAULT_OUT

if TYPE_CHECKING:
    from minilm.orchestrator.evaluation.comparison import Score
    from minilm.orchestrator.tracking.registry import RegisteredModel

GATED = "champion"  # an alias that moves by numbers only, whatever options are given


def add_gate_options(promote: argparse.ArgumentParser) -> None:
    promote.add_argument(
        "--tasks", metavar="NAME,…", help="that must have been run (champion: all that the candidate has run)"
    )
    promote.add_argument(
        "--min-share-of-teacher",
        type=positive,
        metavar="SHARE",
        help="of its score, on each task, as in 0.97",
    )
    promote.add_argument("--teacher", metavar="MODEL", help="as it was given to minilm evaluate")
    promote.add_argument(
        "--max-drop",
        type=not_negative,
        default=0.005,
        metavar="DROP",
        help="by which a score may lie below that of the version the alias names now (default: 0.005)",
    )
    promote.add_argument(
        "--results", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"--out of evaluate ({DEFAULT_OUT})"
    )
    promote.add_argument(
        "--force", metavar="REASON", help="move it though a line fails; the reason is recorded"
    )


def not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive(text)


def is_gated(options: argparse.Namespace) -> bool:
    asked = options.tasks or options.min_share_of_teacher or options.force is not None
    return options.alias == GATED or bool(asked)


def pass_gate(options: argparse.Namespace, store: str, candidate: RegisteredModel) -> None:
    """Check what was recorded, print each line and note all in the registry; `challenger` moves in any case.

    Raises `UserError` with the first line that fails, unless a reason was given.
    """
    from minilm.orchestrator.evaluation.gate import Gate, check_gate
    from minilm.orchestrator.evaluation.tasks import find_tasks
    from minilm.orchestrator.tracking.promotion import holder, record_gate

    if options.min_share_of_teacher and not options.teacher:
        raise UserError("--min-share-of-teacher needs --teacher MODEL, as it was given to minilm evaluate")
    if options.force is not None and not options.force.strip():
        raise UserError("--force needs a reason, which is recorded: --force 'why it is right all the same'")
    asked = [task.name for task in find_tasks(options.tasks.split(","))] if options.tasks else []
    own = scores_of(options, store, candidate.uri)
    if not own and options.force is None:
        raise UserError(
            f"{candidate.uri} has no recorded result in {options.results}: run minilm evaluate {candidate.uri} "
            f"--out {options.results} first (with --data and --tasks), or name its folder with --results"
        )
    tasks = tuple(asked or dict.fromkeys(score.task for score in own))
    version = holder(store, candidate.name, options.alias)
    before = None if version in (None, candidate.version) else f"models:/{candidate.name}/{version}"
    lines = check_gate(
        Gate(tasks, options.min_share_of_teacher, options.max_drop),
        own,
        scores_of(options, store, options.teacher) if options.min_share_of_teacher else None,
        scores_of(options, store, before) if before else None,
    )
    for line in lines:
        print(f"{'holds' if line.holds else 'fails'}  {line.text}")
    if not lines:
        print(f"holds  no version is {options.alias} yet: nothing to compare with")
    failed = [line for line in lines if not line.holds]
    metrics = {f"{score.protocol}/{score.task}/{score.metric}": score.mean for score in own}
    reason = options.force if failed or not own else None
    record_gate(store, candidate, lines=[line.as_dict() for line in lines], metrics=metrics, reason=reason)
    if failed and reason is None:
        raise UserError(
            f"{options.alias} stays where it is ({len(failed)} of {len(lines)} lines fail), challenger is version "
            f"{candidate.version} now: {failed[0].text}; evaluate what is missing, or give --force REASON"
        )


def scores_of(options: argparse.Namespace, store: str, model: str) -> list[Score]:
    """The recorded scores of a MODEL: of a registered version, or of whatever `minilm evaluate` takes."""
    from minilm.orchestrator.evaluation.comparison import score_all
    from minilm.orchestrator.evaluation.sources import Source, source_digest
    from minilm.orchestrator.evaluation.trials import recorded
    from minilm.orchestrator.tracking.pull import pull_once
    from minilm.orchestrator.verbs.evaluate import open_source

    if model.startswith("models:"):
        folder = pull_once(store, model, options.results / "teachers")
        source = Source(model, "folder", str(folder))
    else:
        options.out = options.results
        source = open_source(model, options)
    return score_all(recorded(options.results, source_digest(source)))
