"""Where a run is, read from the files of its work directory. Asks no process, and changes nothing."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.checkpoint.store import META, step_of
from minilm.orchestrator.driver.status_line import doing_text, finite, seconds_left
from minilm.orchestrator.driver.summary import terms
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import CHECKPOINT_SCHEMES, RunFolder, StageFolder
from minilm.orchestrator.stage.metrics_file import Point, read_all_metrics
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.lease import last_holder
from minilm.orchestrator.system.text import duration, text_table
from minilm.orchestrator.worker.crash_loop import starts

DRIVER = {
    "alive": "works here",
    "ended": "has ended in good order",
    "killed": "was killed; the same command goes on",
    "silent": "is on another machine and gives no sign of life",
}


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint of a stage. `age_seconds`: None where it lies behind a URL."""

    place: str
    step: int
    age_seconds: float | None


@dataclass(frozen=True)
class StageStatus:
    """state: waiting, begun (not at its end, whether or not a process works on it), trained, or done (registered too).

    steps: of the whole stage; with `until` (its condition in words, else "") the most, and once it is met how many it
    is. doing: as rank 0 said last, `heartbeat_seconds` ago; with it `workers`, `loss` by student, speed, and the
    seconds that the steps left take at it (None before the first step). starts: how often workers have begun the
    stage, or gone on with it. held_out: of each student the step of the last measurement and the divergence by term,
    in nats a query. probes: of each student the newest value by name. exports: folders by student. `checkpoint` is
    None where there is none; `checkpoint_error` says why it could not be looked for.
    """

    stage: str
    state: str
    step: int
    steps: int
    doing: str
    heartbeat_seconds: float | None
    checkpoint: Checkpoint | None
    checkpoint_error: str
    held_out: dict[str, dict[str, Any]]
    until: str
    probes: dict[str, dict[str, float]]
    exports: dict[str, str]
    workers: int | None
    starts: int
    loss: dict[str, float]
    tokens_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class RunStatus:
    """recipe: its name, "" before the inputs were found sound. driver: who works here, or did; `driver_state`: a key
    of `DRIVER`, or "" where nobody ever worked. finished: every stage is done."""

    workdir: str
    recipe: str
    driver: str
    driver_state: str
    driver_seconds: float
    preparing: str
    finished: bool
    stages: tuple[StageStatus, ...]

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = finite(asdict(self))
        return values

    def text(self) -> str:
        return "\n".join(described(self))


def run_status(workdir: Path, *, ask_stores: bool = True) -> RunStatus:
    """Raises `UserError` where there is no work directory. ask_stores: whether to look for checkpoints behind a URL."""
    folder = RunFolder(workdir.resolve())
    record, holder = whole_json(folder.run), last_holder(folder.root / "lease")
    if record is None and holder is None:
        raise UserError(f"{workdir} is no work directory of a run (no run.json); give one, as runs/NAME")
    recipe = (record or {}).get("recipe", {"name": "", "stages": []})
    stages = tuple(stage_status(folder.stage(stage["name"]), stage, ask_stores) for stage in recipe["stages"])
    preparing = ""
    if not record:
        building = (folder.data / ".build").exists()
        preparing = "building the data set" if building else "looking at teachers and data"
    return RunStatus(
        workdir=str(folder.root),
        recipe=recipe["name"],
        driver=str(holder.process or "") if holder else "",
        driver_state=holder.state if holder else "",
        driver_seconds=holder.age if holder else 0.0,
        preparing=preparing,
        finished=folder.summary.exists() and all(stage.state == "done" for stage in stages),
        stages=stages,
    )


def whole_json(path: Path) -> Any | None:
    """The value in `path`, None also where a shared file system is between two versions of it."""
    with suppress(ValueError):
        return read_json(path)
    return None


def stage_status(folder: StageFolder, stage: dict[str, Any], ask_stores: bool = True) -> StageStatus:
    """`stage`: as the record of the run has it."""
    names = [student["name"] for student in stage["students"]]
    beat = whole_json(folder.heartbeat)
    checkpoint, error = newest_checkpoint(folder, ask_stores)
    done = folder.done.exists()
    if folder.published.exists():
        state = "done"
    else:
        state = "trained" if done else "begun" if beat or checkpoint else "waiting"
    reached = max(beat["step"] if beat else 0, checkpoint.step if checkpoint else 0)
    points = read_all_metrics(folder.heldout_metrics)
    held_out: dict[str, dict[str, Any]] = {}
    for point in points:
        held_out |= {
            name: {"step": point.step, "sum": sum(by_term.values()), "terms": by_term}
            for name in names
            if (by_term := terms(point.metrics, name))
        }
    last = whole_json(folder.done) if done else beat
    steps = (last or {}).get("steps", stage["steps"])
    now = {} if done or not beat else beat
    metrics = now.get("metrics", {})
    return StageStatus(
        stage=stage["name"],
        state=state,
        step=steps if done else reached,
        steps=steps,
        doing=doing_text(now) if now else "",
        heartbeat_seconds=max(time.time() - now["time"], 0.0) if now else None,
        checkpoint=checkpoint,
        checkpoint_error=error,
        held_out=held_out,
        until=until_text(stage, steps),
        probes=newest_probes(points, names),
        exports={n: str(folder.student(n)) for n in names if done and folder.student(n).is_dir()},
        workers=now.get("workers"),
        starts=starts(folder.root),
        loss={name: metrics[f"{name}/loss"] for name in names if f"{name}/loss" in metrics},
        tokens_per_second=metrics.get("tokens_per_second"),
        seconds_left=seconds_left(now, steps, stage["batch"]) if now else None,
    )


def newest_probes(points: list[Point], names: list[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for point in points:
        for key, value in point.metrics.items():
            student, _, probe = key.partition("/heldout/probe/")
            if probe and student in found:
                found[student][probe] = value
    return {name: values for name, values in found.items() if values}


def until_text(stage: dict[str, Any], steps: int) -> str:
    """The stage's condition in words, and whether it is met."""
    if not (until := stage.get("until")):
        return ""
    conditions = []
    if until["share_of_teacher"] is not None:
        conditions.append(f"has {until['share_of_teacher']:g} of the teacher's")
    if until["patience"] is not None:
        conditions.append(f"has no gain in {until['patience']} measurements")
    met = f"met: {steps:,} steps in all" if steps < stage["steps"] else f"not met: at most {steps:,} steps"
    return f"until {until['probe']} {' or '.join(conditions)} ({met})"


def newest_checkpoint(folder: StageFolder, ask_stores: bool) -> tuple[Checkpoint | None, str]:
    """The checkpoint, and what kept it from being looked for."""
    place = (whole_json(folder.spec) or {}).get("checkpoints")
    if place and place.partition("://")[0] in CHECKPOINT_SCHEMES and not ask_stores:
        return None, f"in {place}"
    try:
        store = open_store(place, folder.checkpoints)
        names = store.names()
    except (OSError, UserError) as error:  # a store that does not answer, or a package that is missing
        return None, str(error)
    if not names:
        return None, ""
    path, age = f"{store.where}/{names[-1]}", None
    with suppress(OSError):  # behind a URL, or removed meanwhile
        age = max(time.time() - (Path(path) / META).stat().st_mtime, 0.0)
    return Checkpoint(path, step_of(names[-1]), age), ""


def described(status: RunStatus) -> list[str]:
    """The status as lines for a person."""
    lines = [f"{status.recipe or 'a run'} in {status.workdir}" + (": finished" if status.finished else "")]
    if status.driver_state:
        who = status.driver or "a process"
        sign = f" (last sign of life {duration(status.driver_seconds)} ago)"
        lines.append(f"{who} {DRIVER[status.driver_state]}{'' if status.driver_state == 'ended' else sign}")
    if status.preparing:
        lines.append(f"no stage has begun: {status.preparing}")
    if not status.stages:
        return lines
    rows = [("stage", "state", "step", "last checkpoint", "held-out divergence", "now")]
    for stage in status.stages:
        now = ""
        if stage.doing and stage.heartbeat_seconds is not None:
            now = f"{stage.doing}, {duration(stage.heartbeat_seconds)} ago"
        steps = f"{stage.step:,} of {stage.steps:,}"
        rows.append((stage.stage, stage.state, steps, checkpoint_text(stage), held_out_text(stage), now))
    lines += ["", text_table(rows)]
    for stage in status.stages:
        beside = [f"  {name}  {probes_text(values)}" for name, values in stage.probes.items()]
        beside += [f"  {stage.until}"] * bool(stage.until)
        lines += ["", f"stage {stage.stage}:", *beside] if beside else []
    exports = [f"  {name}  {path}" for stage in status.stages for name, path in stage.exports.items()]
    return [*lines, "", "exported students:", *exports] if exports else lines


def checkpoint_text(stage: StageStatus) -> str:
    if stage.checkpoint is None:
        return stage.checkpoint_error or "-"
    age = stage.checkpoint.age_seconds
    return f"step {stage.checkpoint.step:,}" + ("" if age is None else f", {duration(age)} ago")


def probes_text(values: dict[str, float]) -> str:
    """`knn 0.410 (41% of the teacher's), cka 0.720 (72%)`."""
    shown: list[str] = []
    for probe in [name for name in values if "/" not in name]:
        share = values.get(f"{probe}/share-of-teacher")
        whose = "" if shown else " of the teacher's"
        shown.append(f"{probe} {values[probe]:.3f}" + ("" if share is None else f" ({share:.0%}{whose})"))
    return ", ".join(shown)


def held_out_text(stage: StageStatus) -> str:
    several = len(stage.held_out) > 1
    values = [
        f"{name} {v['sum']:.3f}" if several else f"{v['sum']:.3f}" for name, v in stage.held_out.items()
    ]
    steps = {value["step"] for value in stage.held_out.values()}
    return f"{', '.join(values)} at step {steps.pop():,}" if values else "-"
