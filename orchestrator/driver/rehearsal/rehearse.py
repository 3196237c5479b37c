"""The rehearsal of a recipe: a few steps of every stage, killed once a checkpoint is there, gone on with to the end.

All that is written lies in one scratch folder: `run/` is the work directory of the rehearsal, whose tracker and
registry are its own. Of the real work directory files are read at most.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.driver.rehearsal.inputs import Inputs
from minilm.orchestrator.driver.rehearsal.play import Ended, Watcher, play
from minilm.orchestrator.driver.rehearsal.recipe import STEPS, few_steps
from minilm.orchestrator.driver.rehearsal.report import Part, Rehearsal, StageRate
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import InfrastructureError, RecipeErrors, Stopped, UserError
from minilm.orchestrator.launch.attempt import FAILURES
from minilm.orchestrator.launch.cluster import end_leftovers
from minilm.orchestrator.plan.cost import Machine, Work, checkpoint_bytes, flops_per_second, memory, scale
from minilm.orchestrator.plan.estimate import works
from minilm.orchestrator.plan.reading import reading
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.references import HubRef, absent_package, parse_reference
from minilm.orchestrator.recipe.schema import Recipe, Stage
from minilm.orchestrator.resolve.workers import workers_of
from minilm.orchestrator.stage.folder import RunFolder, StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.signals import StopRequest

WARM_UP = 2  # steps of a stage that say nothing of its rate


@contextmanager
def scratch_folder(real: Workdir, name: str, *, keep: bool) -> Iterator[RunFolder]:
    """A folder beside the real work directory, where there is room and every node sees it; removed unless `keep`."""
    parent = real.root.parent
    try:
        created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"rehearsal-{name}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"cannot rehearse in {parent}: {error.strerror}; give another --workdir, beside which there is room"
        ) from error
    try:
        yield RunFolder(scratch)
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):
                for folder in created:
                    folder.rmdir()


def rehearse(
    recipe: Recipe,
    real: Workdir,
    scratch: RunFolder,
    arguments: Sequence[str],
    line: StatusLine,
    *,
    stop: StopRequest,
    deadline: float,
    assumed: tuple[str, str],
    keep: bool,
) -> tuple[Rehearsal, Ended]:
    """What was seen, and how the rehearsal ended.

    arguments: for `minilm run`, beside recipe and work directory. deadline: by the monotonic clock. assumed: device and
    precision of the plan. Raises `UserError` for a recipe or inputs that can't be used.
    """
    line.show("rehearsal  looking at data and models", force=True)
    inputs = Inputs(recipe, real, scratch)
    inputs.take_sample()
    inputs.take_tasks()
    values = few_steps(recipe, inputs.place, shards=inputs.shards, sample=inputs.sample, tasks=inputs.tasks)
    file = scratch.root / "rehearsal.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    run, small = RunFolder(scratch.root / "run"), load_recipe(file)
    watcher = Watcher(run, [stage.name for stage in small.stages])
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [str(file), "--workdir", str(run.root), *arguments]
    log = scratch.root / "run.log"
    playing = partial(play, command, environment, watcher, line, log, stop=stop, deadline=deadline)
    try:
        ended = playing(kill_when=lambda: watcher.newest_checkpoint() is not None)
        killed = watcher.newest_checkpoint() if ended.exit_code is None else None
        attempts = {attempt for seen in watcher.seen.values() for attempt in seen.first_steps}
        trained = killed is not None and run.stage(killed[0]).done.exists()
        if killed:
            line.say(
                f"rehearsal  killed in stage {killed[0]} with step {killed[1]} saved; the same command goes on"
            )
            ended = playing()
    finally:
        end_leftovers(run.cluster)
        line.close()
    found = works_of(recipe, inputs, run, assumed)
    parts = (
        *parts_of(recipe, run, watcher.newest_checkpoint()),
        resumed(killed, trained, attempts, watcher, ended),
        *parts_behind(recipe, run),
    )
    report = Rehearsal(
        recipe=recipe.name,
        steps=STEPS,
        data=inputs.data,
        parts=parts,
        stages=tuple(rates(recipe, run, watcher, found, assumed)),
        at_most=any(stage.until for stage in recipe.stages),
        tokenizing_seconds=0.0 if inputs.shards else reading(recipe).seconds,
        kept=str(scratch.root) if keep else "",
    )
    problems = [problem.replace(str(file), recipe.name) for problem in ended.problems]
    return report, replace(ended, problems=problems)


def parts_of(recipe: Recipe, run: RunFolder, checkpoint: tuple[str, int] | None) -> list[Part]:
    trained = [stage.name for stage in recipe.stages if run.stage(stage.name).done.exists()]
    saved = f"step {checkpoint[1]} of stage {checkpoint[0]}" if checkpoint else ""
    return [
        Part("inputs", run.run.exists(), "teachers, students and data fit each other"),
        Part(
            "training", len(trained) == len(recipe.stages), f"{len(trained)} of {len(recipe.stages)} stages"
        ),
        Part("checkpoint", checkpoint is not None, saved),
    ]


def resumed(
    killed: tuple[str, int] | None, trained: bool, attempts: set[str], watcher: Watcher, ended: Ended
) -> Part:
    """Whether the run went on from its checkpoint. trained: the stage was at its end when it was killed; attempts:
    those of before."""
    name = "kill and resume"
    if killed is None:
        return Part(name, False, "it ended before it could be killed")
    stage, step = killed
    if trained:
        return Part(
            name,
            ended.exit_code == 0,
            f"killed behind the last step of stage {stage}, and went on from there",
        )
    first = [s for attempt, s in watcher.seen[stage].first_steps.items() if attempt not in attempts]
    said = f"killed in stage {stage} with step {step} saved"
    if not first:  # workers on a cluster that was joined may have come to the stage's end by themselves
        ok = ended.exit_code == 0
        return Part(name, ok, f"{said}, and went on behind it" if ok else f"{said}, and did not go on")
    return Part(name, first[0] >= step, f"{said}, went on at step {first[0]}")


def parts_behind(recipe: Recipe, run: RunFolder) -> list[Part]:
    """What comes after the steps."""
    folders = [run.stage(stage.name).student(s.name) for stage in recipe.stages for s in stage.students]
    exported = [folder.name for folder in folders if (folder / "config.json").exists()]
    published = [read_json(run.stage(stage.name).published) or {"models": []} for stage in recipe.stages]
    registered = [m["registered"] for one in published for m in one["models"] if m["registered"]]
    evaluated = "the recipe has none"
    if recipe.evaluation:
        evaluated = (
            f"{', '.join(recipe.evaluation.tasks)}, on a few rows{'; no gate' if recipe.promote else ''}"
        )
    return [
        Part("export", len(exported) == len(folders), ", ".join(exported)),
        Part(
            "registration", len(registered) == len(folders), f"{', '.join(registered)}, in a scratch registry"
        ),
        Part("evaluation", run.evaluated.exists() if recipe.evaluation else None, evaluated),
    ]


def works_of(recipe: Recipe, inputs: Inputs, run: RunFolder, assumed: tuple[str, str]) -> list[Work] | None:
    """Of the true recipe, for the plan; None where a teacher's config or the rows' length is not to be had."""

    def place(reference: str) -> str:
        found = inputs.place(reference)
        if not absent_package(found) and isinstance(parse_reference(found), HubRef):
            fetched = run.teachers / found.replace("/", "--")
            return str(fetched) if fetched.is_dir() else found
        return found

    specs = [read_json(run.stage(stage.name).spec) for stage in recipe.stages]
    lengths = [spec["data"]["seq_len"] for spec in specs if spec]
    values = few_steps(recipe, place, shards=inputs.shards, sample=inputs.sample)
    try:
        found = works(Recipe.model_validate(values), lengths[0] if lengths else None, *assumed)
    except UserError:
        return None
    return [
        replace(work, steps=stage.steps, until=stage.until is not None)
        for work, stage in zip(found, recipe.stages, strict=True)
    ]


def rates(
    recipe: Recipe, run: RunFolder, watcher: Watcher, found: Sequence[Work] | None, assumed: tuple[str, str]
) -> Iterator[StageRate]:
    """A line for each stage; the first that was measured gives the rate that the plan is made with."""
    machine: Machine | None = None
    for number, stage in enumerate(recipe.stages):
        folder, seen, work = run.stage(stage.name), watcher.seen[stage.name], found[number] if found else None
        rate, planned = measured_rate(folder), None
        workers = seen.workers or workers_of(recipe).most
        if work and machine:
            seconds = scale(work, machine, workers).seconds
            planned = work.batch * work.seq_len / seconds if seconds else None
        elif work and rate:
            machine = Machine(flops_per_second(work, rate / workers), *assumed)
        on_device = device_memory(folder)
        yield StageRate(
            stage=stage.name,
            workers=seen.workers,
            rate=rate,
            planned_rate=planned,
            memory=on_device or seen.memory or None,
            planned_memory=planned_memory(work, is_host=not on_device) if work else None,
            checkpoint=checkpoint_size(folder),
            planned_checkpoint=checkpoint_bytes(work) if work else None,
            seconds=stage_seconds(stage, folder, rate or planned),
        )


def measured_rate(folder: StageFolder) -> float | None:
    """Tokens a second of all workers: the median of the steps, without the first ones."""
    found = [(p.step, p.metrics["tokens_per_second"]) for p in read_all_metrics(folder.step_metrics)]
    values = [value for step, value in found if step > WARM_UP] or [value for _, value in found]
    return statistics.median(values) if values else None


def stage_seconds(stage: Stage, folder: StageFolder, rate: float | None) -> float | None:
    """Of the stage's true number of steps at a rate in tokens a second."""
    spec = read_json(folder.spec)
    if rate is None or spec is None:
        return None
    return float(stage.steps * stage.batch * spec["data"]["seq_len"] / rate)


def device_memory(folder: StageFolder) -> int:
    """Bytes of the GPU of rank 0 that were in use at most; 0 without one."""
    points = read_all_metrics(folder.system_metrics)
    values = [
        value
        for point in points
        for key, value in point.metrics.items()
        if key.startswith("system/gpu_") and key.endswith("_memory_usage_megabytes")
    ]
    return int(max(values, default=0.0) * 1e6)


def planned_memory(work: Work, *, is_host: bool) -> int:
    """Of the worker of rank 0; in host memory lies the copy that it saves from too."""
    found = memory(work)
    return found.total + found.save_copy if is_host else found.device


def checkpoint_size(folder: StageFolder) -> int | None:
    store = LocalStore(folder.checkpoints)
    names = store.names()
    if not names:
        return None
    return sum(path.stat().st_size for path in (store.folder / names[-1]).rglob("*") if path.is_file())


def check(report: Rehearsal, ended: Ended, minutes: float) -> None:
    """Raises what the rehearsal has come to, unless all parts were seen."""
    missing = ", ".join(part.name for part in report.failed)
    if ended.stopped:
        raise Stopped(
            f"the rehearsal was stopped; not seen: {missing or 'its end'}; it had {minutes:g} minutes (--minutes)"
        )
    if ended.exit_code and ended.problems:
        kind = FAILURES.get(ended.exit_code, InfrastructureError)
        raise RecipeErrors(ended.problems) if kind is UserError else kind("; ".join(ended.problems))
    if ended.exit_code or missing:
        raise InfrastructureError(
            f"the rehearsal has not shown: {missing or 'its end'}; --keep leaves its folder, with run.log"
        )
