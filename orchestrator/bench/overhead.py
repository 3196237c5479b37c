"""Measures what supervision costs: the time of a step when the same stage is run in several ways.

    step    `train_step` alone in this process: rows in memory, nothing logged or saved
    worker  the whole loop (`python -m minilm.orchestrator.worker`): rows, ledger, metrics, checkpoints
    again   the same a second time, which shows how far two equal runs differ
    inline  `minilm run --launcher inline`: adds driver, lease, the reader of metrics and MLflow (on this disk)
    ray     `minilm run` under Ray: adds Ray's daemons, its controller and its helpers

All have the seed, threads and micro-batches of the recipe's first stage; all except `step` have its rows, metrics and
checkpoints too. All are started first. Then each computes in turn while the others are stopped (SIGSTOP), so that a
machine that is slow for a while is slow for all of them, and each turn is compared with that of `worker` in the same
round. Measured are the clock, and the processor time of a process and of all processes that it has started. Work that
is due by the clock (saves, uploads) becomes due while a run is stopped, too, so its share is overstated in all ways
except `step`.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import open_stream
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.malloc import keep_freed_memory
from minilm.orchestrator.system.processes import descendants, end_all, family, signal_all
from minilm.orchestrator.train.build import build_distiller, make_states
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.numerics import AUTOCAST, choose_precision
from minilm.orchestrator.train.step import train_step
from minilm.orchestrator.worker.crash_loop import reached

WARM_STEPS = 20  # Ray's helpers are still importing during the first ones
POLL_SECONDS = 0.01
STOP_SECONDS = 10
END_SECONDS = 60
NO_STALLS = "compute.stall_seconds=86400"  # else the watchdog would end a run that this bench has stopped


class Cost(NamedTuple):
    """What a step takes: seconds of processor time (all cores together) and of the clock."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class OverheadRow:
    """One way to run the stage.

    wall_ms, cpu_ms: what a step takes by the clock and of processor time, the median over `turns` of `steps` steps.
    wall_over, cpu_over: by which fraction that exceeds `worker` in the same round, median and quartiles.
    """

    way: str
    turns: int
    steps: int
    wall_ms: float
    wall_over: float
    wall_quartiles: tuple[float, float]
    cpu_ms: float
    cpu_over: float
    cpu_quartiles: tuple[float, float]


def overhead_rows(
    recipe: Recipe, file: Path, overrides: Sequence[str], *, starts: int, rounds: int, steps: int
) -> list[OverheadRow]:
    """Measure the first stage of `recipe` (in `file`, with `overrides`) in all five ways.

    They are started `starts` times, and each start has `rounds` turns of `steps` steps for each way. All five are in
    memory at once, on the GPU too. Raises `UserError` if the stage or a turn is too short, if a run ends or goes back
    to an earlier step before it is measured, and if the recipe has checkpoints that a run of its own may be using.
    """
    if recipe.compute.checkpoints is not None:
        raise UserError(
            f"recipe {recipe.name} has compute.checkpoints {recipe.compute.checkpoints}, which a run of it may be "
            f"using; measure with --set compute.checkpoints=null"
        )
    stage = recipe.stages[0]
    needed = WARM_STEPS + rounds * (steps + 2) + 2
    if stage.steps < needed:
        raise UserError(
            f"stage {stage.name} has {stage.steps} steps, too few for {rounds} rounds of {steps}; give less of "
            f"them, or --set stages.{stage.name}.steps={needed}"
        )
    costs: dict[str, list[Cost]] = {name: [] for name in ("step", "worker", "again", "inline", "ray")}
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
            ways = start(Path(folder), exits, recipe, file, overrides)
            for number in range(rounds):
                names, first = list(costs), number % len(costs)
                for name in names[first:] + names[:first]:
                    costs[name].append(ways[name].turn(steps))
            ways.clear()  # frees this start's model before the next start
    if not all(cost.cpu for cost in costs["worker"]):
        raise UserError(f"{steps} steps take less processor time than can be counted; give more --steps")
    return [row(way, found, costs["worker"], steps) for way, found in costs.items()]


def row(way: str, found: Sequence[Cost], base: Sequence[Cost], steps: int) -> OverheadRow:
    walls = [a.wall / b.wall - 1 for a, b in zip(found, base, strict=True)]
    cpus = [a.cpu / b.cpu - 1 for a, b in zip(found, base, strict=True)]
    return OverheadRow(
        way=way,
        turns=len(found),
        steps=steps,
        wall_ms=1e3 * statistics.median(cost.wall for cost in found),
        wall_over=statistics.median(walls),
        wall_quartiles=quartiles(walls),
        cpu_ms=1e3 * statistics.median(cost.cpu for cost in found),
        cpu_over=statistics.median(cpus),
        cpu_quartiles=quartiles(cpus),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def start(
    folder: Path, exits: ExitStack, recipe: Recipe, file: Path, overrides: Sequence[str]
) -> dict[str, BareStep | Run]:
    """Start all ways and stop each after its warm-up. `exits` ends their processes."""
    name = recipe.stages[0].name
    ways: dict[str, BareStep | Run] = {}
    for launcher in ("inline", "ray"):
        work = folder / launcher
        built = folder / "inline" / "data"
        if launcher == "ray" and built.exists():  # the first run has built the recipe's text
            shutil.copytree(built, work / "data")
        command = ["minilm", "run", str(file), "--workdir", str(work), "--launcher", launcher]
        for override in (*overrides, NO_STALLS):
            command += ["--set", override]
        ways[launcher] = exits.enter_context(Run(command, work / "stages" / name, recipe.stages[0].steps))
    spec = StageSpec.from_json(StageFolder(folder / "ray" / "stages" / name).spec.read_text(encoding="utf-8"))
    for alone in ("worker", "again"):
        stage = StageFolder(folder / alone)
        stage.root.mkdir()
        stage.spec.write_text(replace(spec, folder=str(stage.root), lease="").to_json(), encoding="utf-8")
        ways[alone] = exits.enter_context(
            Run(["minilm.orchestrator.worker", str(stage.spec)], stage.root, spec.steps)
        )
    ways["step"] = BareStep(spec)
    return ways


class BareStep:
    """`train_step` in this process: rows in memory, and nothing else in the loop."""

    def __init__(self, spec: StageSpec):
        keep_freed_memory()  # as the worker does
        if spec.runtime.threads:
            torch.set_num_threads(spec.runtime.threads)
        self.spec = spec
        self.world = World(rank=0, size=1, device=torch.device(spec.runtime.device), control=None)
        self.distiller = build_distiller(spec, self.world.device)
        self.students = make_states(spec, self.distiller)
        stream = open_stream(spec.data, seed=spec.seed, batch=spec.batch, micro_batch=spec.micro_batch)
        batches = [stream.micro_batch(0, index) for index in range(stream.num_micro_batches)]
        self.rows = [(index, *batch.sequences) for index, batch in enumerate(batches)]
        self.made = 0
        self.turn(WARM_STEPS)

    def turn(self, steps: int) -> Cost:
        cpu, wall = self.now()
        for _ in range(steps):
            self.step()
        ended_cpu, ended = self.now()
        return Cost((ended_cpu - cpu) / steps, (ended - wall) / steps)

    def step(self) -> None:
        spec, device = self.spec, self.world.device
        train_step(
            self.distiller,
            self.students,
            self.rows,
            step=self.made,
            seed=spec.seed,
            learning_rate=spec.learning_rate.peak_lr,
            max_gradient_norm=spec.optimizer.max_gradient_norm,
            autocast=AUTOCAST[choose_precision(spec.runtime.precision, None, device)],
            world=self.world,
            seq_len=spec.data.seq_len,
        )
        self.made += 1

    def now(self) -> Cost:
        if self.world.device.type == "cuda":  # what is still queued belongs to the steps before
            torch.cuda.synchronize()
        return Cost(time.process_time(), time.perf_counter())


class Run:
    """A run in processes of its own, which are stopped except in their turns.

    command: arguments of `python -m`. folder: the stage's. steps: how many the stage has.
    """

    def __init__(self, command: Sequence[str], folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.step = -1
        self.output = tempfile.TemporaryFile()  # noqa: SIM115, closed by end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_TRACKING_URI": ""},  # no server should keep these runs
            start_new_session=True,
        )

    def __enter__(self) -> Run:
        try:
            self.wait_for(WARM_STEPS)
            self.stop()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def turn(self, steps: int) -> Cost:
        signal_all(family(self.process.pid), signal.SIGCONT)
        first = self.wait_for(reached(self.folder) + 1)
        cpu, wall = tree_seconds(self.process.pid), time.perf_counter()
        made = self.wait_for(first + steps) - first
        cost = Cost((tree_seconds(self.process.pid) - cpu) / made, (time.perf_counter() - wall) / made)
        self.stop()
        return cost

    def wait_for(self, step: int) -> int:
        """Wait until step `step` or a later one is being computed; returns the step that is."""
        while (now := reached(self.folder)) < step:
            if now < self.step:
                raise UserError(
                    f"the run went back from step {self.step} to {now}; its worker has died, measure again"
                )
            self.step = now
            if self.process.poll() is not None:
                self.output.seek(0)
                last = self.output.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise UserError(f"the run ended before it was measured: {last}")
            time.sleep(POLL_SECONDS)
        if now >= self.steps:
            raise UserError(
                f"the stage's {self.steps} steps ended before they were measured; give it more of them"
            )
        return now

    def stop(self) -> None:
        """Stop all processes of the run, until `turn` or `end`."""
        deadline = time.monotonic() + STOP_SECONDS
        while running := [pid for pid, fields in family(self.process.pid).items() if fields[0] != "T"]:
            if time.monotonic() > deadline:
                raise UserError(f"processes {running} of the run do not stop on SIGSTOP; measure again")
            signal_all(running, signal.SIGSTOP)
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        below = descendants(self.process.pid)
        signal_all(family(self.process.pid), signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        end_all(below)
        self.output.close()


def tree_seconds(root: int) -> float:
    """Processor time in seconds of a process and its descendants, ended ones that were waited for included (Linux)."""
    ticks = sum(int(field) for fields in family(root).values() for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")
