"""What comes after the stages: the evaluation, the cards with its results, the gate before champion moves.

Each part can be repeated; `evaluation/done.json`, written last, says that nothing is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from minilm.orchestrator.driver.evaluation import evaluate_models
from minilm.orchestrator.driver.model_cards import complete_card
from minilm.orchestrator.driver.promotion import compared_with, metrics_of, pass_gate, registered_source
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.driver.summary import ModelEntry
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.comparison import Comparison, Score
from minilm.orchestrator.evaluation.gate import Gate, Line
from minilm.orchestrator.evaluation.tasks import find_tasks
from minilm.orchestrator.launch.base import Launcher
from minilm.orchestrator.recipe.schema import Promotion, Recipe
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.tracking import registry
from minilm.orchestrator.tracking.promotion import record_gate, record_scores
from minilm.orchestrator.tracking.registry import RegisteredModel
from minilm.orchestrator.tracking.tracking import Tracking


def wind_up(
    recipe: Recipe,
    workdir: Workdir,
    models: Sequence[ModelEntry],
    notes: Sequence[str],
    launcher: Launcher,
    tracking: Tracking,
    line: StatusLine,
) -> None:
    """Do what the recipe asks for after its stages. notes: on licences, for the cards."""
    store = tracking.uri
    versions = {m.name: version_of(store, m) for m in models if m.registered}
    candidates = [student.name for student in recipe.stages[-1].students] if recipe.promote else []
    before: dict[str, str | None] = {}
    wrong: dict[str, str] = {}  # why a candidate can't be compared
    for name in candidates:
        assert recipe.promote is not None
        try:
            before[name] = compared_with(store, versions[name], recipe.promote.alias, recipe.promote.against)
        except UserError as error:
            wrong[name] = str(error)
    comparison = None
    if recipe.evaluation:
        others = dict.fromkeys(uri for uri in before.values() if uri)
        sources = [registered_source(store, uri, workdir.teachers) for uri in others]
        comparison = evaluate_models(recipe, workdir, models, launcher, tracking, line, sources)
    for stage in recipe.stages:
        for student in stage.students:
            folder = workdir.stage(stage.name)
            complete_card(recipe, folder, student.name, notes, comparison)
            path = folder.student(student.name)
            versions[student.name] = registry.replace_card(store, versions[student.name], path)
            if comparison:
                own = [score for score in comparison.scores if score.model == student.name]
                record_scores(store, versions[student.name], metrics_of(own))
    if recipe.promote and comparison:
        for name in candidates:
            gate_candidate(
                store,
                recipe.promote,
                versions[name],
                name,
                comparison,
                before.get(name),
                wrong.get(name),
                line,
            )
    write_json(workdir.evaluated, workdir.wound_up_as(recipe))


def version_of(store: str, entry: ModelEntry) -> RegisteredModel:
    """The version of an entry that has `NAME vNUMBER`."""
    name, _, number = entry.registered.rpartition(" v")
    return registry.resolve(store, f"models:/{name}/{number}")


def gate_candidate(
    store: str,
    section: Promotion,
    candidate: RegisteredModel,
    name: str,
    comparison: Comparison,
    before: str | None,
    wrong: str | None,
    line: StatusLine,
) -> None:
    """Move the aliases of one student, and say which lines hold."""

    def of(model: str | None) -> list[Score]:
        return [score for score in comparison.scores if score.model == model]

    own = of(name)
    asked = section.tasks or tuple(score.task for score in own)
    tasks = tuple(task.name for task in find_tasks(asked))
    if wrong is not None:
        lines = [Line(wrong, section.against or "")]
        record_gate(store, candidate, lines=[one.as_dict() for one in lines], reason=None)
    else:
        lines = pass_gate(
            store,
            candidate,
            Gate(tasks, section.min_share_of_teacher, section.max_drop),
            section.alias,
            own=own,
            teacher=of(comparison.teacher) if section.min_share_of_teacher else None,
            current=of(before) if before else None,
        )
    failed = [one for one in lines if not one.holds]
    said = [f"{'holds' if one.holds else 'fails'}  {one.text}" for one in lines]
    uri = f"models:/{candidate.name}@{section.alias}"
    said.append(
        f"{uri} stays where it is ({len(failed)} of {len(lines)} lines fail); challenger is version {candidate.version}"
        if failed
        else f"{uri} is version {candidate.version} now, and so is challenger"
    )
    line.say(
        "\n".join(said),
        event="gate",
        model=candidate.name,
        version=candidate.version,
        alias=section.alias,
        moved=not failed,
        lines=[one.as_dict() for one in lines],
    )
