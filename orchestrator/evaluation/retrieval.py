"""Search as a task: sets of queries, texts and judgements, as BEIR and the hub lay them out.

    SET/corpus.jsonl  SET/queries.jsonl  SET/qrels/test.tsv     BEIR's own
    SET/corpus/  SET/queries/  SET/qrels/  with parquet files   a data set of the hub for each set
    corpus/  queries/  qrels/  with SET-00000-of-00001.parquet  one of the hub with all of them

As sentence-transformers and BEIR do it: a title stands before its text, a text without a character is never found, and
a query that no text answers is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.data.errors import DataError
from minilm.data.records.encoding import refuse_pointer
from minilm.data.records.tables import has_column, rows
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.read_tables import task_folder
from minilm.orchestrator.evaluation.tasks import TASKS

PARTS = ("corpus", "queries", "qrels")
_BEIR = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}
_SHARD = re.compile(r"(.+?)(?:-\d+-of-\d+)?\.parquet")
Row = tuple[str, Mapping[str, Any]]  # where it stands, and its columns


@dataclass(frozen=True)
class SetFiles:
    """A set and its files, by part."""

    name: str
    files: Mapping[str, tuple[Path, ...]]


@dataclass(frozen=True)
class RetrievalSet:
    """queries: those that some text answers. grades: of each query, how well texts answer it (1 or more), by their
    numbers."""

    queries: list[str]
    texts: list[str]
    grades: list[dict[int, int]]


def find_sets(data: Path) -> list[SetFiles]:
    """Every set in the task's folder, by name. UserError for a folder that is none, or where there is none."""
    root = task_folder(TASKS["nanobeir"], data)
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    together = [path for path in folders if path.name in PARTS]
    found = _sets_together(root) if together else []
    found += [_set_in(path) for path in folders if path not in together]
    if not found:
        raise _other_layout(root)
    return sorted(found, key=lambda one: one.name)


def read_set(found: SetFiles) -> RetrievalSet:
    """UserError, with file and row, where anything is not as published."""
    texts = _texts(found.files["corpus"])
    queries = _texts(found.files["queries"])
    if (count := sum(map(bool, texts.values()))) < 2:
        raise UserError(
            f"{found.files['corpus'][0]} holds {count} texts, and a ranking needs two or more; put the published file "
            f"in its place"
        )
    numbers = {key: number for number, key in enumerate(texts)}
    grades: dict[str, dict[int, int]] = {}
    for path in found.files["qrels"]:
        for place, row in _rows(path):
            query = _text(row, ("query-id",), place)
            for text in _several(row, "corpus-id", place):
                for key, known, what in ((query, queries, "query"), (text, texts, "text")):
                    if key not in known:
                        raise UserError(
                            f"{place}: judges {what} {key!r}, which {found.files[_PART_OF[what]][0]} does not hold; "
                            f"bring the three files of {found.name} again, of one version"
                        )
                if (grade := _grade(row, place)) > 0 and queries[query]:
                    grades.setdefault(query, {})[numbers[text]] = grade
    if not grades:
        raise UserError(
            f"{found.files['qrels'][0]} names no text that answers a query; put the published file in its place"
        )
    return RetrievalSet([queries[key] for key in grades], list(texts.values()), list(grades.values()))


_PART_OF = {"query": "queries", "text": "corpus"}


def write_set(given: RetrievalSet, folder: Path) -> None:
    """In BEIR's own layout."""
    (folder / "qrels").mkdir(parents=True)
    for part, texts in (("corpus", given.texts), ("queries", given.queries)):
        lines = [json.dumps({"_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)]
        (folder / _BEIR[part]).write_text("".join(lines), encoding="utf-8")
    judged = [f"{i}\t{text}\t{grade}\n" for i, one in enumerate(given.grades) for text, grade in one.items()]
    (folder / _BEIR["qrels"]).write_text("query-id\tcorpus-id\tscore\n" + "".join(judged), encoding="utf-8")


def _set_in(folder: Path) -> SetFiles:
    if all((folder / name).is_file() for name in _BEIR.values()):
        return SetFiles(folder.name, {part: (folder / name,) for part, name in _BEIR.items()})
    files = {part: tuple(sorted((folder / part).glob("*.parquet"))) for part in PARTS}
    if not all(files.values()):
        raise _other_layout(folder)
    judged = tuple(path for path in files["qrels"] if path.name.startswith("test"))
    return SetFiles(folder.name, files | ({"qrels": judged} if judged else {}))


def _sets_together(root: Path) -> list[SetFiles]:
    """By the names of the files, which are those of the splits."""
    by_set: dict[str, dict[str, tuple[Path, ...]]] = {}
    for part in PARTS:
        for path in sorted((root / part).glob("*.parquet")):
            if match := _SHARD.fullmatch(path.name):
                files = by_set.setdefault(match[1], {})
                files[part] = (*files.get(part, ()), path)
    for name, files in by_set.items():
        if lacking := [part for part in PARTS if part not in files]:
            raise UserError(
                f"task nanobeir: {root / lacking[0]} lacks {name}-00000-of-00001.parquet; add it as it is published"
            )
    return [SetFiles(name, files) for name, files in by_set.items()]


def _other_layout(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return UserError(
        f"task nanobeir: {folder} has another layout (found: {there or 'nothing'}); expected a folder for each set "
        f"with {', '.join(_BEIR.values())}, or with parquet files in {', '.join(f'{part}/' for part in PARTS)}"
    )


def _texts(files: tuple[Path, ...]) -> dict[str, str]:
    """By id, in the order of the files."""
    found: dict[str, str] = {}
    for path in files:
        for place, row in _rows(path):
            key = _text(row, ("_id", "id"), place)
            title, text = row.get("title"), _text(row, ("text",), place)
            text = f"{title} {text}".strip() if title else text if text.strip() else ""
            if found.setdefault(key, text) != text:
                raise UserError(
                    f"{place}: id {key!r} is there before, with another text; bring the file again as published"
                )
    return found


def _rows(path: Path) -> Iterator[Row]:
    """Of a .jsonl, .tsv or .parquet file."""
    read = {".jsonl": _lines, ".tsv": _table}.get(path.suffix, _parquet)
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(64), str(path))
        yield from read(path)
    except DataError as error:
        raise UserError(str(error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number} is no JSON object; put the published file in its place")
                yield f"{path}:{number}", row


def _table(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
        for number, line in enumerate(stream, start=2):
            if line.strip():
                cells = line.rstrip("\r\n").split("\t")
                yield f"{path}:{number}", dict(zip(header, cells, strict=False))


def _parquet(path: Path) -> Iterator[Row]:
    names = ("_id", "id", "title", "text", "query-id", "corpus-id", "score")
    columns = [name for name in names if has_column(str(path), "parquet", name) == name]
    for place, row, _ in rows(str(path), "parquet", columns):
        yield f"{path}, {place}", row


def _text(row: Mapping[str, Any], columns: tuple[str, ...], place: str) -> str:
    """Of the first of `columns` that the row has; ids may be numbers."""
    value = next((row[name] for name in columns if row.get(name) is not None), None)
    if not isinstance(value, str | int):
        raise UserError(
            f"{place}: no {' or '.join(map(repr, columns))} ({_given(row)}); put the published file in its place"
        )
    return str(value)


def _several(row: Mapping[str, Any], column: str, place: str) -> list[str]:
    """A row of judgements may name one text or a list."""
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    return [_text({column: one}, (column,), place) for one in values]


def _grade(row: Mapping[str, Any], place: str) -> int:
    """1 where judgements have no grades."""
    value = row.get("score", 1)
    try:
        grade = float(value)
        if grade != int(grade):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{place}: score {value!r}; allowed: a whole number, 0 for a text that does not answer the query"
        ) from None
    return int(grade)


def _given(row: Mapping[str, Any]) -> str:
    return f"it has {', '.join(sorted(map(str, row))[:6]) or 'nothing'}"
