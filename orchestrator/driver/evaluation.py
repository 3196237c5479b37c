"""After the stages: students, teachers and controls are scored as the recipe asks, and compared on one page.

Trials are independent: the launcher runs them side by side where it has room, each leaves a file, and a run that was
killed goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minilm.model.errors import ModelError
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.driver.summary import ModelEntry
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.evaluation.comparison import Comparison, score_all
from minilm.orchestrator.evaluation.report.page import StageStory, write_reports
from minilm.orchestrator.evaluation.report.papers import FIGURES, Beside
from minilm.orchestrator.evaluation.sources import Source, check_source
from minilm.orchestrator.evaluation.speed import this_device
from minilm.orchestrator.evaluation.trials import Trial, plan_trials, run_trial
from minilm.orchestrator.launch.base import Launcher
from minilm.orchestrator.recipe.schema import Evaluation, Recipe
from minilm.orchestrator.resolve.evaluation import evaluation_tasks
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import Point, read_all_metrics
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.tracking.tracking import Tracking

RUN = "Evaluation"  # the child run in MLflow; no stage can be called so


def evaluate_models(
    recipe: Recipe,
    workdir: Workdir,
    models: Sequence[ModelEntry],
    launcher: Launcher,
    tracking: Tracking,
    line: StatusLine,
    others: Sequence[Source] = (),
) -> Comparison:
    """Score `models`, their controls and `others`, and leave report.html and report.md in the work directory. Raises
    `UserError` for data that are not as published, `Stopped` on request."""
    section = recipe.evaluation
    assert section is not None
    sources = [*sources_of(models, section, line), *others]
    device = torch.device("cpu") if recipe.compute.device == "cpu" else this_device()
    trials = plan_trials(
        sources,
        evaluation_tasks(section),
        Path(section.data),
        seeds=section.seeds,
        train_rows=section.train_rows,
        device=device,
        results=workdir.evaluation,
    )
    run = tracking.stage(RUN, {"evaluation": section.model_dump(mode="json")})
    launcher.prepare(lambda text, force: line.show(text, force=force))
    results: list[dict[str, Any]] = []
    try:
        for result in launcher.each(one_trial, [(trial, str(workdir.evaluation)) for trial in trials]):
            results.append(result)
            last = f"{result['model']}  {result['task']}  seed {result['seed']}"
            part = (len(results), len(trials))
            line.show(f"evaluating  {part[0]}/{part[1]}  {last}", force=True, doing="evaluating", part=part)
        comparison = Comparison(score_all(results), sources, sources[0].name)
        stories = [story_of(stage.name, workdir.stage(stage.name)) for stage in recipe.stages]
        write_reports(workdir.root, recipe.name, comparison, stories, beside_paper(recipe, workdir))
    except BaseException:
        run.finish("FAILED")
        raise
    scores = {f"{s.protocol}/{s.task}/{s.metric}/{_key(s.model)}": s.mean for s in comparison.scores}
    tracking.metrics(scores, 0)
    for name in ("report.html", "report.md"):
        run.artifact(workdir.root / name)
    run.finish()
    line.say(comparison.text(), event="evaluated", scores=[score.as_dict() for score in comparison.scores])
    return comparison


def story_of(name: str, folder: StageFolder) -> StageStory:
    """The curves and maps of a stage that is done, from its files."""
    losses = _series(read_all_metrics(folder.step_metrics), lambda key: key.endswith("/loss"))
    heldout = read_all_metrics(folder.heldout_metrics)
    shown = read_json(folder.attention_maps) or {}  # a stage of before has none
    return StageStory(
        name=name,
        losses={key.removesuffix("/loss"): points for key, points in losses.items()},
        divergences=_series(heldout, lambda key: key.count("/") == 2),  # STUDENT/heldout/TERM
        probes=_series(heldout, lambda key: "/heldout/probe/" in key),
        tokens=shown.get("tokens", ()),
        maps=dict(sorted(shown["maps"].items(), key=lambda item: item[0] != "teacher")) if shown else None,
    )


def _series(points: Sequence[Point], chosen: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        for key, value in point.metrics.items():
            if chosen(key):
                found.setdefault(key.replace("/heldout/", " "), []).append((point.step, value))
    return found


def beside_paper(recipe: Recipe, workdir: Workdir) -> Beside | None:
    """The paper's figures, where the recipe is called as one of the paper's."""
    if (figures := FIGURES.get(recipe.name)) is None:
        return None
    stage = recipe.stages[-1]
    steps = (read_json(workdir.stage(stage.name).done) or {}).get("steps", stage.steps)
    corpora = [corpus.shards or corpus.tokens or "" for corpus in recipe.data.corpora or ()]
    data = ", ".join([*(recipe.data.text or ()), *corpora])
    return Beside(figures, stage.students[-1].name, steps, recipe.stages[0].teacher, data)


def sources_of(models: Sequence[ModelEntry], section: Evaluation, line: StatusLine) -> list[Source]:
    """The first teacher, the students, and for each student the two controls that can be made."""
    teachers = [entry for entry in models if entry.role == "teacher"]
    students = [entry for entry in models if entry.role != "teacher"]
    found = [Source(entry.name, "folder", entry.folder) for entry in (*teachers, *students)]
    for entry in students if section.controls else ():
        controls = [Source(f"random:{entry.name}", "random", entry.folder)]
        if teachers:
            shape = (entry.layers, entry.hidden)
            name = f"layers:{teachers[0].name}:{entry.layers}x{entry.hidden}"
            controls.append(Source(name, "layers", teachers[0].folder, shape))
        for control in controls:
            try:
                check_source(control)
            except ModelError as error:  # another number of heads, or a wider student
                line.say(f"there is no control {control.name}: {error}")
            else:
                found.append(control)
    return list(dict.fromkeys(found))  # a teacher of two stages, a control of two students of one shape


def one_trial(given: tuple[Trial, str]) -> dict[str, Any]:
    """Run by the launcher, perhaps in another process."""
    trial, folder = given
    return run_trial(trial, Path(folder))


def _key(model: str) -> str:
    """A model's name as MLflow takes it in a metric's."""
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in model)
