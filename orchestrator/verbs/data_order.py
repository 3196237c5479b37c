"""`minilm data explain`, `where` and `verify-run`: which step reads which row, and whether a run did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_json, add_verb, print_report

if TYPE_CHECKING:
    from minilm.data.read.rows import Corpus


def add_explain(verbs: Any) -> None:
    explain = add_verb(
        verbs,
        "explain",
        "show the rows of a step: shard, block, row, first words",
        "minilm data explain books --batch 256 --seed 0 --step 1200",
        "minilm data explain books=0.7 wiki=0.3 --batch 256 --seed 0 --step 1200",
    )
    _add_order(explain)
    explain.add_argument("--step", type=int, required=True)
    explain.set_defaults(run=explain_step)


def add_where(verbs: Any) -> None:
    where = add_verb(
        verbs,
        "where",
        "find the step that reads a row",
        "minilm data where books --batch 256 --seed 0 --row 4711",
    )
    _add_order(where)
    where.add_argument("--row", type=int, required=True, help="counted over all data sets given")
    where.add_argument("--epoch", type=int, default=0)
    where.set_defaults(run=where_row)


def add_verify_run(verbs: Any) -> None:
    verify_run = add_verb(
        verbs,
        "verify-run",
        "compare the rows that a checkpoint was trained on with the data set",
        "minilm data verify-run runs/mine/stages/small/checkpoints/step-000000120-1f3a5b7c",
    )
    verify_run.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder or URL step-… of a stage's checkpoints"
    )
    verify_run.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="where its data sets lie now, in the recipe's order, if they moved",
    )
    add_json(verify_run)
    verify_run.set_defaults(run=verify_run_verb)


def _add_order(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "data", nargs="+", metavar="DIR|URL[=WEIGHT]", help="a data set, or several with weights"
    )
    verb.add_argument("--batch", type=int, required=True)
    verb.add_argument("--seed", type=int, required=True)
    verb.add_argument("--window", type=int, metavar="SHARDS", help="shuffle by windows (default: fully)")
    add_json(verb)


def explain_step(options: argparse.Namespace) -> int:
    from minilm.data.tools.explain import explain

    source = _corpora(options.data)
    order = {"batch": options.batch, "seed": options.seed, "window": options.window}
    print_report(explain(source, step=options.step, **order), options)
    return 0


def where_row(options: argparse.Namespace) -> int:
    from minilm.data.tools.explain import where

    source = _corpora(options.data)
    order = {"batch": options.batch, "seed": options.seed, "window": options.window}
    print_report(where(source, row=options.row, epoch=options.epoch, **order), options)
    return 0


def _corpora(given: list[str]) -> list[Corpus]:
    """`DIR|URL` or `DIR|URL=WEIGHT` each; a folder whose name holds `=` is taken as it is."""
    from minilm.data.open import open_corpora
    from minilm.orchestrator.feed.corpora import cache_folder
    from minilm.orchestrator.stage.data import CacheSpec

    places: list[tuple[str | Path, float]] = []
    for text in given:
        place, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            places.append((text, 1.0))
            continue
        try:
            places.append((place, float(weight)))
        except ValueError:
            raise UserError(f"{text!r}: a weight is a number, as in {place}=0.7") from None
    return open_corpora(places, cache=cache_folder(CacheSpec()))


def verify_run_verb(options: argparse.Namespace) -> int:
    from minilm.orchestrator.driver.status_line import StatusLine
    from minilm.orchestrator.driver.verify_run import verify_run

    line = StatusLine(quiet=options.quiet)
    check = verify_run(
        options.checkpoint,
        options.data,
        lambda done, steps: line.show(f"reading the run's rows again  {done / max(steps, 1):.0%}"),
    )
    line.close()
    print_report(check, options)
    return 0 if check.sound else UserError.exit_code
