"""What supervision costs: processor time a step of `train_step` alone, in an inline `minilm run`, and in one under Ray.

The last two are whole `minilm run`s with tracking, journal, ledger and checkpoints, in processes of their own; counted
is the processor time of the driver and of everything that it has started (Ray's daemons, workers, uploader), between
two steps. Processor time, because a clock would measure whoever else uses the machine. The three take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.corpora import open_stream
from orchestrator.errors import UserError
from orchestrator.metrics import read_all_points
from orchestrator.recipe import Recipe
from orchestrator.stage import StageFolder, StageJob
from orchestrator.steady import AUTOCAST, choose_precision
from orchestrator.step import train_step
from orchestrator.students import build_distiller, make_states
from orchestrator.world import World

WARM_STEPS = 4
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class OverheadRow:
    """cpu_ms: median over the rounds of a step's processor time; overhead: by how much it is above the bare loop's;
    wall_ms: by the clock, for what it is worth on a shared machine."""

    way: str
    rounds: int
    steps: int
    cpu_ms: float
    wall_ms: float
    overhead: float


def overhead_rows(
    recipe: Recipe, file: Path, overrides: Sequence[str], *, rounds: int, steps: int
) -> list[OverheadRow]:
    """Measure the first stage of `recipe` (in `file`, with `overrides`) over `steps` steps, `rounds` times each way.

    Raises `UserError` when the stage is too short, or a run ends before its steps are made.
    """
    stage = recipe.stages[0]
    if stage.steps < steps + WARM_STEPS + 2 * recipe.tracking.log_every:
        raise UserError(
            f"stage {stage.name} has {stage.steps} steps, too few to measure {steps}; give --steps less, or "
            f"--set stages.{stage.name}.steps=N"
        )
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "inline": [], "ray": []}
    with tempfile.TemporaryDirectory() as room:
        for number in range(rounds):
            for launcher in ("inline", "ray"):
                work = Path(room) / f"{launcher}-{number}"
                folder = StageFolder(work / "stages" / stage.name)
                arguments = ["run", str(file), "--workdir", str(work), "--launcher", launcher]
                for override in overrides:
                    arguments += ["--set", override]
                found[launcher].append(supervised(arguments, folder, steps, room))
            job = StageJob.from_json(folder.job.read_text(encoding="utf-8"))
            found["bare"].append(bare(job, steps))
    base = statistics.median(cpu for cpu, _ in found["bare"])
    rows = []
    for way, times in found.items():
        cpu, wall = (statistics.median(values) for values in zip(*times, strict=True))
        rows.append(OverheadRow(way, rounds, steps, 1e3 * cpu, 1e3 * wall, cpu / base - 1))
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

    for number in range(WARM_STEPS):
        step(number)
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(steps):
        step(number)
    return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def supervised(arguments: Sequence[str], folder: StageFolder, steps: int, room: str) -> tuple[float, float]:
    """The same of a run in processes of its own, from the first point behind the warm-up on; then it is ended."""
    with tempfile.TemporaryFile(dir=room) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            first = None
            while True:
                if process.poll() is not None:
                    output.seek(0)
                    raise UserError(
                        f"the run ended before it was measured: {output.read().decode(errors='replace')[-500:]}"
                    )
                step = newest_step(folder)
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


def newest_step(folder: StageFolder) -> int:
    points = read_all_points(folder.points) if folder.points.exists() else []
    return points[-1].step if points else 0


def tree_seconds(root: int) -> float:
    """Processor time of a process and of all below it, those that have ended and been waited for included (Linux)."""
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(int(field) for field in fields[11:15])
    below: set[int] = set()
    found = {root}
    while found:
        below |= found
        found = {pid for pid, parent in parents.items() if parent in below} - below
    return sum(ticks.get(pid, 0) for pid in below) / os.sysconf("SC_CLK_TCK")
