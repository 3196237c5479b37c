"""The `minilm` command: verbs and arguments, nothing else. Everything a verb does is a function elsewhere.

Exit codes: 0 done · 2 bad recipe or input · 3 stopped on request, resumable · 4 no progress · 6 another run holds
the work directory · 10 infrastructure · 130 ended at once by a second Ctrl-C · 141 whoever read the output has gone.
Errors that a user can mend are one line each on standard error.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import select
import sys
from contextlib import closing
from importlib import import_module
from pathlib import Path
from threading import Thread

from data.errors import DataError
from model.errors import ModelError
from orchestrator.allocator import keep_freed_memory
from orchestrator.arguments import positive_whole
from orchestrator.bench_verbs import add_bench_verbs
from orchestrator.data_verbs import add_data_verbs
from orchestrator.errors import RecipeErrors, UserError
from orchestrator.soak import add_soak_verb
from orchestrator.untold import untold


def main(arguments: list[str] | None = None) -> int:
    try:
        try:
            return run_verb(parser().parse_args(arguments))
        finally:
            print(end="", flush=True)  # or what is left would fail behind our back, when the interpreter ends
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # 128 + SIGPIPE, as a shell reports it of programs that this signal ends


def nobody_reads() -> bool:
    """Has the reader of our standard output gone, as in `minilm … | head`?"""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_verb(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        return int(options.run(options) or 0)
    except RecipeErrors as error:
        for problem in error.problems:
            print(f"minilm: error: {problem}", file=sys.stderr)
        return error.exit_code
    except UserError as error:
        print(f"minilm: {'stopped' if error.exit_code == 3 else 'error'}: {error}", file=sys.stderr)
        return error.exit_code
    except (DataError, ModelError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("minilm: stopped; the same command goes on or starts again", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"minilm: error: no space left on the disk{where}; free some and run the same command again",
            file=sys.stderr,
        )
        return UserError.exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="minilm", description="Distil a Transformer encoder into a small one.")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    run = verbs.add_parser("run", help="run a recipe, or go on with it")
    run.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    run.add_argument("--workdir", type=Path, help="where everything is written (default: runs/NAME)")
    run.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a recipe key")
    run.add_argument(
        "--from", dest="redo_from", metavar="STAGE", help="do this stage and those behind it again"
    )
    run.add_argument("--launcher", choices=("ray", "inline"), default="ray")
    run.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, else a local cluster)")
    run.set_defaults(run=run_recipe)

    check = verbs.add_parser("check", help="say everything that is wrong with recipes")
    check.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE.yaml")
    check.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    check.set_defaults(run=check_recipes)

    plan = verbs.add_parser("plan", help="what a recipe will cost, before anything runs")
    plan.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    plan.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a recipe key"
    )
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--tokens-per-second", type=positive, metavar="X", help="of one worker, as measured")
    speed.add_argument(
        "--measure", action="store_true", help="take this machine's matrix products as a measure"
    )
    plan.add_argument(
        "--interconnect", type=positive, default=1.0, metavar="GB/S", help="between workers (default: 1)"
    )
    plan.add_argument(
        "--seq-len", type=positive_whole, metavar="TOKENS", help="a row, where the data set is not here"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object a stage")
    plan.set_defaults(run=plan_recipe)

    add_data_verbs(verbs.add_parser("data", help="build, import, look at and care for data sets"))
    add_bench_verbs(verbs.add_parser("bench", help="measure this machine: the loss, a step, the stream"))
    add_soak_verb(
        verbs.add_parser("soak", help="run a recipe while everything around it is killed, and compare")
    )

    pull = verbs.add_parser("pull", help="bring a registered model down")
    pull.add_argument("uri", metavar="models:/NAME@ALIAS")
    pull.add_argument("out", type=Path, metavar="DIR")
    pull.add_argument("--workdir", type=Path, help="take it from this work directory's own registry")
    pull.set_defaults(run=pull_model)

    promote = verbs.add_parser("promote", help="point an alias to a version of a registered model")
    promote.add_argument("uri", metavar="models:/NAME/VERSION")
    promote.add_argument("alias")
    promote.add_argument("--workdir", type=Path, help="in this work directory's own registry")
    promote.set_defaults(run=promote_model)
    return top


def run_recipe(options: argparse.Namespace) -> int:
    from orchestrator.cluster import Cluster
    from orchestrator.progress import Line
    from orchestrator.recipe import load_recipe
    from orchestrator.signals import StopRequest
    from orchestrator.summary import Summary
    from orchestrator.workdir import Workdir, default_workdir

    under_ray = options.launcher == "ray"
    if not under_ray:  # this process trains
        keep_freed_memory()
    recipe = load_recipe(options.recipe, options.set)
    workdir = Workdir((options.workdir or default_workdir(recipe.name)).resolve())
    if options.redo_from is None and workdir.is_finished(recipe):
        summary = Summary.read(workdir.summary)
        print(f"every stage of {recipe.name} is done already in {workdir.root}", file=sys.stderr)
        if untold(workdir.root):
            with workdir.claim(recipe):
                from orchestrator.tracking import tell_rest

                tell_rest(workdir.root, recipe.tracking.experiment)
    else:
        cluster = Cluster(options.address, recipe.compute.workers[1], workdir.cluster)
        with workdir.claim(recipe, options.redo_from) as lease, StopRequest() as stop, cluster:
            # where the inputs were sound before, Ray starts at once, and the rest is imported beside it
            if under_ray and workdir.goes_on(recipe):
                Thread(target=import_module, args=["orchestrator.curriculum"], name="imports").start()
                with closing(Line()) as line:
                    line.show("starting Ray", force=True)
                    cluster.connect(stop)
            from orchestrator.curriculum import run_recipe  # heavy: only now, when the work directory is ours

            summary = run_recipe(
                recipe,
                options.recipe,
                workdir,
                lease,
                cluster if under_ray else None,
                stop,
                redo_from=options.redo_from,
            )
    print(f"\n{summary.table()}\n\n{summary.next_steps()}")
    return 0


def check_recipes(options: argparse.Namespace) -> int:
    from orchestrator.recipe import load_recipe, missing_inputs

    problems: list[str] = []
    for path in options.recipes:
        try:
            recipe = load_recipe(path, options.set)
        except RecipeErrors as error:
            problems += error.problems
            continue
        if any(Path(stage.teacher).is_dir() for stage in recipe.stages):
            from orchestrator.inputs import config_problems  # brings torch: seconds

            if wrong := config_problems(recipe):
                problems += [f"{path}: {problem}" for problem in wrong]
                continue
        stages = ", ".join(f"{stage.name} ({stage.steps:,} steps)" for stage in recipe.stages)
        print(f"{path}: sound; stages: {stages}")
        for note in missing_inputs(recipe):
            print(f"{path}: not here: {note}")
    if problems:
        raise RecipeErrors(problems)
    return 0


def plan_recipe(options: argparse.Namespace) -> int:
    from orchestrator import plan_verb

    return plan_verb.plan_recipe(options)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a number above 0")
    return value


def pull_model(options: argparse.Namespace) -> int:
    from orchestrator import registry

    model = registry.pull(store(options), options.uri, options.out)
    print(f"{model.name} version {model.version} is in {options.out}")
    return 0


def promote_model(options: argparse.Namespace) -> int:
    from orchestrator import registry

    found = registry.resolve(store(options), options.uri)
    registry.promote(store(options), found.name, found.version, options.alias)
    print(f"models:/{found.name}@{options.alias} is version {found.version} now")
    return 0


def store(options: argparse.Namespace) -> str:
    """The MLflow that holds the registry: the server that the environment names, or a work directory's own."""
    if options.workdir is not None:
        return f"sqlite:///{options.workdir.resolve() / 'mlflow.db'}"
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    raise UserError(
        "set MLFLOW_TRACKING_URI to the registry, or give --workdir DIR of the run that registered it"
    )


if __name__ == "__main__":
    sys.exit(main())
