"""All of a task's files, row by row, before anything is trained: `check`, `run` and `evaluate` refuse the same."""

from __future__ import annotations

from pathlib import Path

from minilm.orchestrator.evaluation.read_tables import has_split, read_split
from minilm.orchestrator.evaluation.tasks import Task


def check_data(task: Task, data: Path) -> int:
    """Read all that the task reads: the number of its training rows, 0 where it has none. UserError where any row is
    not as published."""
    if task.kind == "spans":
        from minilm.orchestrator.evaluation.squad import (
            read_questions,  # torch, which other tasks need not read
        )

        read_questions(data, "dev")
        return len(read_questions(data, "train"))
    for split in task.dev:
        if task.kind != "cosine" or has_split(task, data, split):
            read_split(task, data, split)
    return 0 if task.kind == "cosine" else len(read_split(task, data, "train"))
