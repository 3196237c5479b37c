"""What supervision costs: processor time a step, of the same stage run four ways.

    step    `train_step` alone in this process: rows in memory, nothing logged or saved
    worker  the whole loop alone (`python -m orchestrator.worker`): rows, ledger, points, checkpoints
    inline  `minilm run --launcher inline`: driver, lease, journal's reader and MLflow (on this disk) come to it
    ray     `minilm run` under Ray: its daemons, its controller and its helpers come to it

All have the seed, threads, micro-batches and, but for `step`, the rows, points and checkpoints of the recipe's first
stage. Counted is the processor time of a process and of everything that it has started, between two steps behind the
start: a clock would measure whoever else uses the machine. The four take turns, `rounds` times; medians are compared.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orchestrator.corpora import open_stream
from orchestrator.errors import UserError
from orchestrator.metrics import read_points
from orchestrator.processes import family
from orchestrator.recipe import Recipe
from orchestrator.stage import StageFolder, StageJob
from orchestrator.steady import AUTOCAST, choose_precision
from orchestrator.step import train_step
from orchestrator.students import build_distiller, make_states
from orchestrator.world import World

WARM_STEPS = 20  # Ray's helpers are still importing during the first ones
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class OverheadRow:
    """cpu_ms: median over the rounds of a step's processor time; spread: between its lowest and highest round, as a
    share of it; overhead: by how much the median is above that of `worker`; wall_ms: by the clock, for what it is
    worth on a shared machine."""

    way: str
    rounds: int
    steps: int
    cpu_ms: float
    spread: float
    overhead: float
    wall_ms: float


def overhead_rows(
    recipe: Recipe, file: Path, overrides: Sequence[str], *, rounds: int, steps: int
) -> list[OverheadRow]:
    """Measure the first stage of `recipe` (in `file`, with `overrides`) over `steps` steps, `rounds` times each way.

    Raises `UserError` when the stage is too short, or a run ends before its steps are made, or would take the
    checkpoints of the recipe's own run.
    """
    if recipe.compute.checkpoints is not None:
        raise UserError(
            f"recipe {recipe.name} has compute.checkpoints {recipe.compute.checkpoints}, which a run of it may be "
            f"using; measure with --set compute.checkpoints=null"
        )
    stage = recipe.stages[0]
    needed = steps + WARM_STEPS + 2 * recipe.tracking.log_every
    if stage.steps < needed:
        raise UserError(
            f"stage {stage.name} has {stage.steps} steps, too few to measure {steps}; give --steps less, or "
            f"--set stages.{stage.name}.steps={needed}"
        )
    found: dict[str, list[tuple[float, float]]] = {"step": [], "worker": [], "inline": [], "ray": []}
    with tempfile.TemporaryDirectory() as room:
        built = Path(room) / "inline-0" / "data"
        for number in range(rounds):
            for launcher in ("inline", "ray"):
                work = Path(room) / f"{launcher}-{number}"
                if built.exists():  # made from the recipe's text by the first run
                    shutil.copytree(built, work / "data")
                folder = StageFolder(work / "stages" / stage.name)
                command = ["orchestrator", "run", str(file), "--workdir", str(work), "--launcher", launcher]
                for override in overrides:
                    command += ["--set", override]
                found[launcher].append(supervised(command, folder, steps, room))
            job = StageJob.from_json(folder.job.read_text(encoding="utf-8"))
            folder = StageFolder(Path(room) / f"worker-{number}")
            folder.root.mkdir()
            folder.job.write_text(replace(job, folder=str(folder.root), lease="").to_json(), encoding="utf-8")
            found["worker"].append(supervised(["orchestrator.worker", str(folder.job)], folder, steps, room))
            found["step"].append(bare(job, steps))
    base = statistics.median(cpu for cpu, _ in found["worker"])
    rows = []
    for way, times in found.items():
        cpus, walls = zip(*times, strict=True)
        cpu, wall = statistics.median(cpus), statistics.median(walls)
        spread = (max(cpus) - min(cpus)) / cpu
        rows.append(OverheadRow(way, rounds, steps, 1e3 * cpu, spread, cpu / base - 1, 1e3 * wall))
    return rows


def bare(job: StageJob, steps: int) -> tuple[float, float]:
    """Processor and clock seconds of `train_step` in this process: rows in memory, and nothing but the step."""
    if job.threads:
        torch.set_num_threads(job.threads)
    world = World(rank=0, size=1, device=torch.device(job.device), control=None)
    distiller = build_distiller(job, world.device)
    students = make_states(job, distiller)
    stream = open_stream(job.data, seed=job.seed, batch=job.batch, micro_batch=job.micro_batch)
    batches = [stream.micro_batch(0, index) for index in range(stream.num_micro_batches)]
    rows = [(index, batch.input_ids, batch.mask) for index, batch in enumerate(batches)]

    def step(number: int) -> None:
        train_step(
            distiller,
            students,
            rows,
            step=number,
            seed=job.seed,
            learning_rate=job.peak_lr,
            max_gradient_norm=job.max_gradient_norm,
            autocast=AUTOCAST[choose_precision(job.precision, None, world.device)],
            world=world,
            seq_len=job.data.seq_len,
        )

    def now() -> tuple[float, float]:
        if world.device.type == "cuda":  # what is queued belongs to the steps before
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    for number in range(WARM_STEPS):
        step(number)
    cpu, wall = now()
    for number in range(steps):
        step(number)
    ended_cpu, ended = now()
    return (ended_cpu - cpu) / steps, (ended - wall) / steps


def supervised(command: Sequence[str], folder: StageFolder, steps: int, room: str) -> tuple[float, float]:
    """The same of a run in processes of its own, from the first point behind the warm-up on; then it is ended.

    `command`: for `python -m`. `folder`: where its points come.
    """
    with tempfile.TemporaryFile(dir=room) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_TRACKING_URI": ""},  # a server would keep the runs
            start_new_session=True,
        )
        try:
            first, step, offset = None, 0, 0
            while True:
                if process.poll() is not None:
                    output.seek(0)
                    raise UserError(
                        f"the run ended before it was measured: {output.read().decode(errors='replace')[-500:]}"
                    )
                points, offset = read_points(folder.points, offset)
                if points:
                    step = points[-1].step
                if first is None and step >= WARM_STEPS:
                    first = step, tree_seconds(process.pid), time.perf_counter()
                elif first is not None and step >= first[0] + steps:
                    made = step - first[0]
                    return (
                        (tree_seconds(process.pid) - first[1]) / made,
                        (time.perf_counter() - first[2]) / made,
                    )
                time.sleep(LOOK_SECONDS)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tree_seconds(root: int) -> float:
    """Processor time of a process and of all below it, those that have ended and been waited for included (Linux)."""
    ticks = sum(int(field) for fields in family(root).values() for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")
