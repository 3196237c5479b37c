"""The gate of `minilm promote`: an alias moves when scores hold, or with a reason."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import positive
from minilm.orchestrator.verbs.evaluate import DEFAULT_OUT, TRIAL_OPTIONS, add_trial_options

if TYPE_CHECKING:
    from minilm.orchestrator.evaluation.comparison import Score
    from minilm.orchestrator.evaluation.sources import Source
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
        "--against",
        metavar="ALIAS",
        help="compare with the version of this alias (default: the one that moves)",
    )
    promote.add_argument(
        "--evaluate",
        action="store_true",
        help="run what is not recorded yet; with --data and what else evaluate takes",
    )
    add_trial_options(promote)
    promote.add_argument(
        "--results", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"--out of evaluate ({DEFAULT_OUT})"
    )
    promote.add_argument(
        "--force", metavar="REASON", help="move it though a line fails; the reason is recorded"
    )


def not_negative(text: str) -> float:
    try:
        return 0.0 if text in ("0", "0.0") else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: 0 or a number above it") from None


def is_gated(options: argparse.Namespace) -> bool:
    asked = options.tasks or options.min_share_of_teacher or options.against or options.evaluate
    return options.alias == GATED or bool(asked) or options.force is not None


def promote_gated(options: argparse.Namespace, store: str, candidate: RegisteredModel) -> None:
    """Score what is asked for, print each line of the gate and move the aliases: `challenger` in any case.

    Raises `UserError` with the first line that fails, unless a reason was given.
    """
    from minilm.orchestrator.driver.promotion import compared_with, pass_gate, registered_source
    from minilm.orchestrator.evaluation.gate import Gate
    from minilm.orchestrator.evaluation.tasks import find_tasks

    check_options(options)
    asked = [task.name for task in find_tasks(options.tasks.split(","))] if options.tasks else []
    options.out = options.results
    before = compared_with(store, candidate, options.alias, options.against)
    pulled = options.results / "teachers"
    sources = {"candidate": registered_source(store, candidate.uri, pulled)}
    if before:
        sources["before"] = registered_source(store, before, pulled)
    if options.min_share_of_teacher:
        sources["teacher"] = source_of(options, store, options.teacher)
    if options.evaluate:
        scores = {name: scored(options, source) for name, source in sources.items()}
    else:
        scores = {name: recorded_scores(options, source) for name, source in sources.items()}
    own = scores["candidate"]
    if not own and options.force is None:
        raise UserError(
            f"{candidate.uri} has no recorded result in {options.results}: give --evaluate --data DIR, or run minilm "
            f"evaluate {candidate.uri} --out {options.results} first, or name its folder with --results"
        )
    lines = pass_gate(
        store,
        candidate,
        Gate(
            tuple(asked or dict.fromkeys(score.task for score in own)),
            options.min_share_of_teacher,
            options.max_drop,
        ),
        options.alias,
        own=own,
        teacher=scores.get("teacher"),
        current=scores.get("before"),
        force=options.force,
    )
    for line in lines:
        print(f"{'holds' if line.holds else 'fails'}  {line.text}")
    if not lines:
        print(f"holds  no version is {options.alias} yet: nothing to compare with")
    failed = [line for line in lines if not line.holds]
    if failed and options.force is None:
        raise UserError(
            f"{options.alias} stays where it is ({len(failed)} of {len(lines)} lines fail), challenger is version "
            f"{candidate.version} now: {failed[0].text}; evaluate what is missing (--evaluate), or give --force REASON"
        )


def check_options(options: argparse.Namespace) -> None:
    """UserError for options that need another one."""
    if options.alias == "challenger":
        raise UserError(
            "given 'challenger', which moves to every candidate, whether or not its scores hold; give another alias"
        )
    if options.min_share_of_teacher and not options.teacher:
        raise UserError("--min-share-of-teacher needs --teacher MODEL, as it was given to minilm evaluate")
    if options.force is not None and not options.force.strip():
        raise UserError("--force needs a reason, which is recorded: --force 'why it is right all the same'")
    idle = [name for name in TRIAL_OPTIONS if getattr(options, name[2:].replace("-", "_")) is not None]
    if idle and not options.evaluate:
        raise UserError(f"{idle[0]} needs --evaluate, which runs what is not recorded yet")
    if options.evaluate and options.data is None:
        raise UserError(
            "--evaluate needs --data DIR, which holds a folder with the published files of each task"
        )


def source_of(options: argparse.Namespace, store: str, model: str) -> Source:
    """A MODEL: a registered version, or whatever else `minilm evaluate` takes."""
    from minilm.orchestrator.driver.promotion import registered_source
    from minilm.orchestrator.tracking.registry import resolve
    from minilm.orchestrator.verbs.evaluate import open_source

    if model.startswith("models:"):
        return registered_source(store, resolve(store, model).uri, options.results / "teachers")
    return open_source(model, options)


def recorded_scores(options: argparse.Namespace, source: Source) -> list[Score]:
    from minilm.orchestrator.evaluation.comparison import score_all
    from minilm.orchestrator.evaluation.sources import source_digest
    from minilm.orchestrator.evaluation.trials import recorded

    return score_all(recorded(options.results, source_digest(source)))


def scored(options: argparse.Namespace, source: Source) -> list[Score]:
    """The scores of the tasks that are asked for, from their files where these are there."""
    from minilm.orchestrator.evaluation.comparison import score_all
    from minilm.orchestrator.verbs.evaluate import run_trials

    return score_all(run_trials(options, [source]))
