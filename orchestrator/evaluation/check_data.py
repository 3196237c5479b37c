"""All of a task's files, row by row, before anything is trained: `check`, `run` and `evaluate` refuse the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from minilm.orchestrator.evaluation.read_tables import find_layout, has_split, read_split, squad_file
from minilm.orchestrator.evaluation.retrieval import find_sets, read_set
from minilm.orchestrator.evaluation.tasks import TASKS, Task


def check_data(task: Task, data: Path) -> int:
    """Read all that the task reads: the number of its training rows, 0 where it has none. UserError where any row is
    not as published."""
    if task.kind == "spans":
        from minilm.orchestrator.evaluation.squad import (
            read_questions,  # torch, which other tasks need not read
        )

        read_questions(data, "dev")
        return len(read_questions(data, "train"))
    if task.kind == "retrieval":
        for found in find_sets(data):
            read_set(found)
        return 0
    for split in task.dev:
        if task.kind != "cosine" or has_split(task, data, split):
            read_split(task, data, split)
    return 0 if task.kind == "cosine" else len(read_split(task, data, "train"))


def data_files(task: Task, data: Path) -> list[Path]:
    """Every file that the task reads, in order."""
    if task.kind == "spans":
        return [squad_file(data, split) for split in ("train", "dev")]
    if task.kind == "retrieval":
        return [path for one in find_sets(data) for files in one.files.values() for path in files]
    layout, folder = find_layout(task, data)
    splits = [s for s in layout.files if s == "train" or s in task.dev]
    if task.kind == "cosine":
        splits = [split for split in splits if split != "train"]
    own = [folder / name for split in splits for name in layout.files[split]]
    also = data_files(TASKS[task.trained_on], data) if task.trained_on else []
    return [path for path in own if path.is_file()] + also


def data_fingerprint(task: Task, data: Path) -> str:
    """sha256 (hex) over the bytes of the task's files."""
    digest = hashlib.sha256()
    for path in data_files(task, data):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
