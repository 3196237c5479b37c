"""`minilm run`: run a recipe, or go on with it."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.launch.base import LAUNCHERS, LaunchOptions, load_launcher
from minilm.orchestrator.tracking.pending import has_pending
from minilm.orchestrator.verbs.arguments import add_json, add_overrides, add_recipe, add_verb

if TYPE_CHECKING:
    from minilm.orchestrator.driver.status_line import StatusLine
    from minilm.orchestrator.driver.summary import Summary


def add_run(verbs: Any) -> None:
    run = add_verb(
        verbs,
        "run",
        "run a recipe, or go on with it",
        "minilm run recipes/quickstart.yaml",
        "minilm run mine.yaml --workdir runs/mine --set data.text=/corpora/wiki",
        "minilm run mine.yaml --set stages.small.steps=200000 --from small",
        "minilm run mine.yaml --json > events.jsonl",
    )
    add_recipe(run)
    run.add_argument("--workdir", type=Path, help="where everything is written (default: runs/NAME)")
    add_overrides(run)
    run.add_argument(
        "--from",
        dest="redo_from",
        metavar="STAGE[@STEP]",
        help="do this stage and those behind it again; @STEP: from its checkpoint of that step, with another end",
    )
    run.add_argument("--launcher", choices=tuple(LAUNCHERS), default="ray")
    run.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, else a local cluster)")
    add_json(run, "print what happens as JSON objects, one a line (docs/runs.md), and no table")
    run.set_defaults(run=run_recipe)


def run_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.driver.status_line import JsonLines, StatusLine

    line = JsonLines() if options.json else StatusLine(quiet=options.quiet)
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # only our lines are JSON
        summary = run_or_read(options, line)
    if options.json:
        line.say(summary.table(), event="result", **summary.to_json())
    else:
        print(f"\n{summary.table()}\n\n{summary.next_steps()}")
    return 0


def run_or_read(options: argparse.Namespace, line: StatusLine) -> Summary:
    """Run the recipe; of one that is done already, tell the tracker what is left and read the summary."""
    from minilm.orchestrator.driver.summary import Summary
    from minilm.orchestrator.driver.workdir import Workdir, default_workdir
    from minilm.orchestrator.recipe.load import read_recipe
    from minilm.orchestrator.recipe.show import whole_text
    from minilm.orchestrator.resolve.workers import workers_of
    from minilm.orchestrator.system.files import sha256_json
    from minilm.orchestrator.system.signals import StopRequest

    launcher_type = load_launcher(options.launcher)
    launcher_type.configure_process()
    recipe, source = read_recipe(options.recipe, options.set)
    workdir = Workdir((options.workdir or default_workdir(recipe.name)).resolve())
    if options.redo_from is None and workdir.is_finished(recipe) and workdir.is_wound_up(recipe):
        summary = Summary.read(workdir.summary)
        line.say(f"every stage of {recipe.name} is done already in {workdir.root}")
        if has_pending(workdir.root):
            with workdir.claim(recipe):
                from minilm.orchestrator.tracking.tracking import flush_pending

                flush_pending(workdir.root, recipe.tracking.experiment)
    else:
        compute, joins = recipe.compute, launcher_type.joins(options.address)
        least, most, reason = workers_of(recipe, joins=joins)
        if reason and not launcher_type.alone:
            line.say(reason)
        launch = LaunchOptions(
            workdir,
            compute.device,
            (least, most),
            compute.wait_seconds,
            address=options.address,
            auto=joins and compute.workers == "auto",
        )
        with (
            workdir.claim(recipe, options.redo_from) as lease,
            StopRequest() as stop,
            launcher_type(launch, stop) as launcher,
        ):
            # where the inputs were sound before, the launcher gets ready at once, and the rest is imported beside it
            if workdir.goes_on(recipe):
                Thread(
                    target=import_module, args=["minilm.orchestrator.driver.curriculum"], name="imports"
                ).start()
                with closing(line):
                    launcher.prepare(lambda text, force: line.show(text, force=force))
            from minilm.orchestrator.driver.curriculum import run_recipe

            summary = run_recipe(
                recipe,
                options.recipe,
                workdir,
                lease,
                launcher,
                stop,
                line,
                redo_from=options.redo_from,
                whole=whole_text(recipe, source, sha256_json(recipe.result_fields())),
            )
    return summary
