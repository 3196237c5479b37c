"""A recipe's `evaluation` section against the tasks that there are and the files that are here."""

from __future__ import annotations

from pathlib import Path

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.protocols import Protocol, protocol_of
from minilm.orchestrator.evaluation.read_tables import data_files
from minilm.orchestrator.evaluation.tasks import Task, find_tasks
from minilm.orchestrator.recipe.schema import Evaluation, Recipe


def evaluation_tasks(section: Evaluation) -> list[tuple[Task, Protocol]]:
    """Each task with its protocol. UserError for names that there are not."""
    return [(task, protocol_of(task, section.protocol)) for task in find_tasks(section.tasks)]


def evaluation_problems(recipe: Recipe, *, running: bool = False) -> list[str]:
    """Why the section can't be done, a line or none. running: that its folder is not here is a reason too."""
    if (section := recipe.evaluation) is None:
        return []
    try:
        tasks = evaluation_tasks(section)
        if running or Path(section.data).is_dir():
            for task, _ in tasks:
                data_files(task, Path(section.data))
    except UserError as error:
        return [f"evaluation: {str(error).removeprefix('--data ')}"]
    return []
