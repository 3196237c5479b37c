"""`python -m tests.soak`: run a recipe again and again with faults injected, and compare it with a run without faults.

    WORKDIR/reference/     the run without faults: one worker, no Ray
    WORKDIR/disk/round-N/  the work directory of a round; removed if all invariants hold, else kept as WORKDIR/round-N
    WORKDIR/round-N.log    the output of `minilm run`
    WORKDIR/soak.json      the report so far

`faults` has the fault schedule, `testbed` the machinery that the faults act on, `round` leads a run through them, and
`invariants` checks the finished run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.orchestrator.cli import run_verb
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import write_json
from tests.soak.faults import WEIGHTS, fault_schedule
from tests.soak.report import Report, last_line, say

if TYPE_CHECKING:
    from minilm.orchestrator.recipe.schema import Recipe
    from tests.soak.testbed import Testbed


def main(arguments: list[str] | None = None) -> int:
    soak = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    soak.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    soak.add_argument(
        "--minutes", type=float, default=10.0, help="how long faults are injected (default: 10)"
    )
    soak.add_argument(
        "--seed", type=int, default=0, help="seed of the fault schedule; each round takes the next one"
    )
    soak.add_argument("--workdir", type=Path, help="a new folder (default: runs/soak-NAME)")
    soak.add_argument("--only", help=f"inject these faults only, of {','.join(WEIGHTS)}")
    soak.add_argument(
        "--hang-seconds", type=float, default=300.0, help="no step for so long is a hang (default: 300)"
    )
    soak.add_argument(
        "--disk-mb", type=int, default=256, help="size of the disk, a tmpfs, that is filled (default: 256)"
    )
    soak.add_argument("--json", action="store_true", help="print the report as JSON")
    soak.set_defaults(run=soak_verb, verbose=0)
    return run_verb(soak.parse_args(arguments))


def soak_verb(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.load import load_recipe

    for name in ("minutes", "hang_seconds", "disk_mb"):
        if not 0 < (value := getattr(options, name)) < float("inf"):
            option = name.replace("_", "-")
            raise UserError(f"--{option}: given {value:g}; allowed: a number above 0")

    recipe = load_recipe(options.recipe)
    folder = (options.workdir or Path("runs") / f"soak-{recipe.name}").resolve()
    kinds = check_options(recipe, folder, options.only)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)  # so that nothing is left over
    try:
        report = soak(
            recipe,
            options.recipe.resolve(),
            folder,
            kinds,
            seed=options.seed,
            seconds=60 * options.minutes,
            hang_seconds=options.hang_seconds,
            disk_mb=options.disk_mb,
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text())
    return 0 if report.passed else 1


def check_options(recipe: Recipe, folder: Path, only: str | None) -> list[str]:
    """The kinds of faults to inject. Raises `UserError` for a recipe or options that a soak cannot use."""
    if recipe.compute.gradient_sum != "exact" or recipe.compute.threads is None:
        raise UserError(
            f"recipe {recipe.name} cannot be soaked: weights are compared bit for bit, so it needs "
            f"compute.gradient_sum: exact (now {recipe.compute.gradient_sum}) and a number of compute.threads (now "
            f"{recipe.compute.threads})"
        )
    if recipe.compute.checkpoints is not None:
        raise UserError(
            f"recipe {recipe.name} cannot be soaked: every round needs checkpoints of its own, so leave "
            f"compute.checkpoints out (now {recipe.compute.checkpoints})"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new --workdir, or delete it")
    kinds = only.split(",") if only else list(WEIGHTS)
    if unknown := [kind for kind in kinds if kind not in WEIGHTS]:
        raise UserError(f"--only {only}: {', '.join(unknown)} is none of {','.join(WEIGHTS)}")
    return kinds


def soak(
    recipe: Recipe,
    recipe_file: Path,
    folder: Path,
    kinds: list[str],
    *,
    seed: int,
    seconds: float,
    hang_seconds: float,
    disk_mb: int,
) -> Report:
    """Play rounds until `seconds` are over; the last one runs to its end. Ctrl-C ends with the report so far."""
    from minilm.orchestrator.driver.workdir import Workdir
    from tests.soak.invariants import check_round
    from tests.soak.round import Round
    from tests.soak.testbed import Testbed

    report = Report(seed)
    reference = Workdir(folder / "reference")
    folder.mkdir(parents=True, exist_ok=True)
    say("the run without faults, on one worker")
    run_without_faults(recipe_file, reference.root, folder / "reference.log")
    try:
        check_room(reference.root, disk_mb)
        with Testbed(folder, *recipe.compute.workers, disk_mb) as testbed:
            kinds = possible(kinds, recipe, testbed)
            deadline = time.monotonic() + seconds
            number = 0
            while time.monotonic() < deadline:
                number += 1
                work = Workdir(testbed.disk / f"round-{number}")
                say(f"round {number}: faults of seed {seed + number - 1}: {', '.join(kinds)}")
                overrides = [f"tracking.experiment=soak-round-{number}"]
                testbed.prepare(recipe_file, work.root, folder / f"round-{number}.log", overrides)
                soak_round = Round(
                    recipe,
                    work,
                    testbed,
                    fault_schedule(seed + number - 1, kinds),
                    report,
                    reference,
                    hang_seconds,
                )
                finished = soak_round.run(deadline)
                found = check_round(recipe, work, reference, testbed.server_uri) if finished else {}
                for name, problems in found.items():
                    report.problems[name] += [f"round {number}: {problem}" for problem in problems]
                if not finished or any(found.values()):
                    shutil.copytree(work.root, folder / f"round-{number}")
                    say(f"round {number} is kept in {folder}/round-{number}")
                shutil.rmtree(work.root)
                report.rounds += finished
                write_json(folder / "soak.json", report.as_dict())
                say(
                    f"round {number} is over: {report.kills} kills, {'passed' if report.passed else 'FAILED'} so far"
                )
                if not finished:
                    break
    except KeyboardInterrupt:
        say("interrupted")
    write_json(folder / "soak.json", report.as_dict())
    return report


def run_without_faults(recipe: Path, work: Path, log: Path) -> None:
    command = [sys.executable, "-m", "minilm", "run", str(recipe), "--workdir", str(work)]
    environment = dict(os.environ) | {"MLFLOW_TRACKING_URI": ""}
    with log.open("ab") as out:
        code = subprocess.run(
            [*command, "--launcher", "inline"], stdout=out, stderr=out, env=environment, check=False
        ).returncode
    if code:
        raise UserError(f"the run without faults ended with exit code {code}; {last_line(log)}")


def check_room(reference: Path, disk_mb: int) -> None:
    """Raises `UserError` if a round might fill the disk without a fault, by its saves and the logs of its workers."""
    taken = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file()) / 2**20
    least = math.ceil(1.5 * taken)
    if disk_mb < least:
        raise UserError(
            f"--disk-mb: given {disk_mb}; allowed: at least {least}, half as much again as the run without faults "
            f"took ({taken:.1f} MB)"
        )


def possible(kinds: list[str], recipe: Recipe, testbed: Testbed) -> list[str]:
    """The kinds of faults that this machine and recipe allow; says which ones are left out and why."""
    impossible = {
        "full": ""
        if testbed.has_own_disk
        else "mounting a small tmpfs is not allowed; try `unshare -Urm python -m tests.soak …`",
        "node": "" if testbed.most > testbed.least else "compute.workers is not a range",
        "cache": "" if recipe.data.cache else "the recipe has no data.cache, with shards behind a URL",
    }
    for kind in kinds:
        if impossible.get(kind):
            say(f"fault {kind!r} is left out: {impossible[kind]}")
    return [kind for kind in kinds if not impossible.get(kind)]
