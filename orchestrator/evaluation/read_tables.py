"""The files of a task, as it is published, become examples. Tables are split at tabs and never quoted (GLUE's are not).

Everything that is not as published is refused with the file and line: a task read wrongly gives a plausible number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.tasks import TASKS, Layout, Task, plain

SUBFOLDERS = ("", "raw", "original")
MAX_BROKEN_SHARE = 0.001  # QQP as GLUE publishes it has a few rows without a label


@dataclass(frozen=True)
class Examples:
    """Sentences or pairs of one split. labels: int64 classes or float64 scores [rows]. languages: of each row, where
    the split has several."""

    first: list[str]
    second: list[str] | None
    labels: np.ndarray
    languages: list[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def pick(self, rows: np.ndarray) -> Examples:
        second, languages = self.second, self.languages
        return Examples(
            [self.first[i] for i in rows],
            None if second is None else [second[i] for i in rows],
            self.labels[rows],
            None if languages is None else [languages[i] for i in rows],
        )


def task_folder(task: Task, data: Path) -> Path:
    """The task's folder in `data`, whatever case and hyphens it is written with. UserError names what is there."""
    if not data.is_dir():
        raise UserError(
            f"--data {data}: no such folder; give the folder that holds {task.folders[0]}/ and so on"
        )
    names = [plain(name) for name in (task.folders[0], task.name, *task.folders[1:])]
    folders = {plain(path.name): path for path in sorted(data.iterdir()) if path.is_dir()}
    for name in names:
        if name in folders:
            return folders[name]
    there = ", ".join(sorted(path.name for path in folders.values())) or "no folder"
    raise UserError(
        f"task {task.name} has no folder in {data} (there: {there}); expected {data / task.folders[0]} with "
        f"{expected(task)}"
    )


def expected(task: Task) -> str:
    """The files that a task's folder may hold, in words."""
    if task.kind == "spans":
        return "train-v2.0.json, dev-v2.0.json"
    if task.kind == "retrieval":
        return "a folder for each set"
    forms = [", ".join(name for names in layout.files.values() for name in names) for layout in task.layouts]
    return " (or ".join(forms) + ")" * (len(forms) - 1)


def find_layout(task: Task, data: Path) -> tuple[Layout, Path]:
    """The layout whose files are there, and their folder. UserError where there is none, or a part of one only."""
    root = task_folder(task, data)
    needed = ("train", *task.dev) if task.kind != "cosine" else ()
    partly: list[str] = []
    for layout in task.layouts:
        for folder in (root / sub for sub in SUBFOLDERS):
            splits = [s for s in layout.files if all((folder / name).is_file() for name in layout.files[s])]
            wanted = [split for split in needed if split in layout.files] or list(task.dev)
            if all(split in splits for split in wanted) or (
                task.kind == "cosine" and {*splits} & {*task.dev}
            ):
                return layout, folder
            if splits:
                lacking = [n for s in wanted for n in layout.files.get(s, ()) if not (folder / n).is_file()]
                partly.append(f"{folder} lacks {', '.join(lacking)}")
    if partly:
        raise UserError(f"task {task.name}: {partly[0]}; add it as it is published")
    names = sorted(path.name for path in root.iterdir())
    there = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    raise UserError(
        f"task {task.name}: {root} has another layout (found: {there or 'nothing'}); expected {expected(task)}"
    )


def squad_file(data: Path, split: str) -> Path:
    """SQuAD 2.0's published file of "train" or "dev"."""
    folder = task_folder(TASKS["squad2"], data)
    name = f"{split}-v2.0.json"
    for path in (folder / sub / name for sub in SUBFOLDERS):
        if path.is_file():
            return path
    names = sorted(path.name for path in folder.iterdir())
    raise UserError(
        f"task squad2: {folder} has another layout (found: {', '.join(names[:6]) or 'nothing'}); expected "
        f"train-v2.0.json, dev-v2.0.json"
    )


def has_split(task: Task, data: Path, split: str) -> bool:
    layout, folder = find_layout(task, data)
    return all((folder / name).is_file() for name in layout.files.get(split, ("?",)))


def read_split(task: Task, data: Path, split: str) -> Examples:
    """One split of a task. UserError with file and line where a row is not as published."""
    if split == "train" and task.trained_on:
        return read_split(TASKS[task.trained_on], data, split)
    layout, folder = find_layout(task, data)
    first, second, labels, languages = [], [], [], []
    for name in layout.files[split]:
        for one, other, label, language in _rows(task, layout, folder / name):
            first.append(one)
            second.append(other)
            labels.append(label)
            languages.append(language)
    if not first:
        raise UserError(
            f"{folder / layout.files[split][0]} holds no rows; put the published file in its place"
        )
    kind = np.float64 if task.score_range else np.int64
    return Examples(
        first,
        None if layout.second is None else second,
        np.asarray(labels, dtype=kind),
        languages if layout.language is not None else None,
    )


def _rows(task: Task, layout: Layout, path: Path) -> Iterator[tuple[str, str, float, str]]:
    wanted = [layout.first, layout.second, layout.label, layout.language]
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        try:
            lines = [line.rstrip("\r\n").split("\t") for line in stream]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from error
    begin = 0
    if layout.has_header:
        header = lines[0] if lines else []
        lacking = [str(name) for name in wanted if name is not None and name not in header]
        if lacking:
            given = ", ".join(header[:8]) or "nothing"
            raise UserError(
                f"{path}:1: no column {lacking[0]!r} in its header ({given}); expected the published file of "
                f"{task.name}, with columns {', '.join(str(name) for name in wanted if name is not None)}"
            )
        columns = [None if name is None else header.index(str(name)) for name in wanted]
        begin = 1
    else:
        columns = [None if number is None else int(number) for number in wanted]
    width = 1 + max(column for column in columns if column is not None)
    broken: list[int] = []
    count = 0
    for number, cells in enumerate(lines[begin:], start=begin + 1):
        if cells == [""]:
            continue
        count += 1
        if len(cells) < width:
            broken.append(number)
            continue
        one, other, label, language = ("" if column is None else cells[column] for column in columns)
        if label != task.ignored:
            yield one, other, _label(task, label, f"{path}:{number}"), language
    if len(broken) > MAX_BROKEN_SHARE * count:
        raise UserError(
            f"{path}:{broken[0]}: {len(lines[broken[0] - 1])} columns, expected {width} or more ({len(broken)} of "
            f"{count} rows are so); expected the published file of {task.name}, split by tabs"
        )


def _label(task: Task, text: str, where: str) -> float:
    if task.score_range is None:
        if text not in task.labels:
            raise UserError(f"{where}: label {text!r}; allowed in {task.name}: {', '.join(task.labels)}")
        return task.labels[text]
    least, most = task.score_range
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise UserError(
            f"{where}: score {text!r}; allowed in {task.name}: a number from {least:g} to {most:g}"
        )
    return value
