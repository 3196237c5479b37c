"""Text files -> documents: txt, json, jsonl, csv, tsv, parquet, arrow, plain or packed.

What a document is:
  txt             a run of lines, ended by a blank line; in a file whose first 16 MiB have no blank line, or with the
                  option line_documents, each line
  json, jsonl     a record (data.records.json_values says what is one); the file's name decides nothing
  csv, tsv        a row (data.records.csv_rows)
  parquet, arrow  a row

Of records with fields one field is the text, the same in all files (data.records.fields). A unit is the share of a file
that one task reads: a byte range where a file can be entered in the middle (plain txt and JSON lines), else every k-th
group of documents. A document keeps its position (byte offset or ordinal), which does not depend on how the file was
cut into units. Every record is yielded as a document (perhaps empty) or as a `LeftOut`.
Left out: markup, languages, de-duplication.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from minilm.data.errors import DataError
from minilm.data.records import csv_rows, fields, tables
from minilm.data.records.encoding import (
    LineEnds,
    Utf8Stream,
    decoded,
    encoding_of,
    feeds,
    refuse_pointer,
)
from minilm.data.records.json_values import (
    Scanner,
    is_line_of_records,
    records,
    shape_of,
    values_of_line,
)
from minilm.data.records.lines import Line, documents, is_blank, lines_from
from minilm.data.sources.accounts import LeftOut, Noticed, counted
from minilm.data.sources.find import changed, find_files, format_of, shown, summary
from minilm.data.sources.magic import is_parquet, refuse_other
from minilm.data.sources.plugin import Document, Item, Plan, take
from minilm.data.sources.progress import tell
from minilm.data.sources.unpack import Closing, open_unpacked, packer_of

_PEEK_BYTES = 16 << 20
_PEEK_RECORDS = 200
_BEGIN_BYTES = 1 << 16
_RANGE_BYTES = 8 << 20
_GROUP_DOCUMENTS = 64
_MAX_PARTS = 8  # every part of a file that cannot be entered in the middle reads it from the start
_MAX_LINE = 1 << 30
_TABLES = ("parquet", "arrow")
REPLACED = "places that were not UTF-8, replaced by U+FFFD"


class TextFile(NamedTuple):
    """One input file and how it is read. `field` is None where records are plain text; `how` has what its format needs:
    by_line (txt), shape (json), dialect (csv), columns (tables)."""

    path: str
    num_bytes: int
    format: str
    packer: str | None
    encoding: str
    replace: bool
    field: str | None
    how: dict[str, Any]


class Unit(NamedTuple):
    """The share of file number `file` that one task reads: bytes [start, stop), or part `part` of
    `num_parts`."""

    file: int
    start: int
    stop: int
    part: int
    num_parts: int


class Settings(NamedTuple):
    """The source's options, checked."""

    text_field: str | None = None
    line_documents: bool = False
    replace: bool = False
    csv: csv_rows.Asked = csv_rows.Asked()


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    """The source "text": files, how each is read, and their units. Options: those of `Settings`."""
    settings, found = settings_of(options), find_files(inputs)
    files, notes = describe_all(found.files, settings)
    every = [list(unit) for number, file in enumerate(files) for unit in units(file, number)]
    spec, paths = [list(file) for file in files], [file.path for file in files]
    return Plan(spec, every, paths, notes + summary(found.left_out), left_out=found.left_out)


def read(spec: Any, unit: Any) -> Iterator[Item]:
    """The documents of one unit."""
    share = Unit(*unit)
    return read_unit(TextFile(*spec[share.file]), share)


def settings_of(options: dict[str, Any]) -> Settings:
    """DataError for an option or a value that is not allowed."""
    names = ("csv_separator", "csv_header", "csv_quoting", "csv_ragged")
    field, by_line, invalid, *of_csv = take(
        options, "text", "text_field", "line_documents", "invalid_utf8", *names
    )
    if field is not None and not isinstance(field, str):
        raise DataError(f"text_field {field!r} is no name; give the name of a field as a text")
    if by_line is not None and not isinstance(by_line, bool):
        raise DataError(f"line_documents {by_line!r}: allowed are true and false")
    if invalid not in (None, "stop", "replace"):
        raise DataError(f"invalid_utf8 {invalid!r} is not known; allowed: stop, replace")
    return Settings(field, bool(by_line), invalid == "replace", csv_rows.asked(*of_csv))


def describe_all(paths: Sequence[Path], settings: Settings) -> tuple[list[TextFile], list[str]]:
    """How each file is read, with one choice of the field for all, and notes for the report. DataError when a file is
    damaged, when none has records, or when the field is not clear."""
    looked = [describe(path, settings) for path in paths]
    with_records = [seen for file, seen in looked if seen.records or file.format == "txt"]
    if not with_records:
        raise DataError(f"text {str(paths[0])!r} holds no records; give a file with text in it")
    seen = [seen for file, seen in looked if file.format != "txt"]
    field = settings.text_field
    if field is None:
        field = fields.choose(seen)
    elif any(s.records and not s.plain for s in seen) and not any(field in s.fields for s in seen):
        _look_further([file for file, _ in looked], seen, field)
    files, notes = [], []
    for file, one in looked:
        chosen = None if file.format == "txt" or one.plain else field
        if file.format in _TABLES and chosen is not None:
            column = tables.has_column(file.path, file.format, chosen)
            file = file._replace(how={"columns": [column] if column else []})
        files.append(file._replace(field=chosen))
        if chosen is not None:
            note = fields.how_chosen(seen, chosen, settings.text_field is not None)
        elif file.format == "txt":
            by_line = file.how["by_line"]
            why = "" if not by_line else " (as asked)" if settings.line_documents else " (no blank lines)"
            note = f"a line is a document{why}" if by_line else "a blank line ends a document"
        else:
            note = "records are plain strings" if one.records else "no records"
        if file.format == "csv":
            note += f"; {csv_rows.Dialect(*file.how['dialect']).text()}" if "dialect" in file.how else ""
        if file.encoding != "utf-8":
            note += f"; {file.encoding.upper()}"
        notes.append(note)
    return files, summed_up([file.path for file in files], notes)


def summed_up(paths: list[str], notes: list[str]) -> list[str]:
    """Notes of many files, a line for each that differs."""
    by_note: dict[str, list[str]] = {}
    for path, note in zip(paths, notes, strict=True):
        by_note.setdefault(note, []).append(path)
    found = []
    for note, named in by_note.items():
        more = f" and {counted(len(named) - 1, 'more file')}" if len(named) > 1 else ""
        found.append(f"{shown(named[0])}{more}: {note}")
    return found


def _look_further(files: list[TextFile], seen: list[fields.Seen], field: str) -> None:
    """DataError unless any record of any file has the field."""
    for file in files:
        if file.format == "txt":
            continue
        trial = file._replace(field=field)
        if file.format in _TABLES:
            column = tables.has_column(file.path, file.format, field)
            if column is None:
                continue
            trial = trial._replace(how={"columns": [column]})
        for _, record in _records(trial, lambda place, count: None):
            if isinstance(record, dict) and isinstance(fields.text_of(record, field), str):
                return
    names = {name for one in seen for name in one.fields}
    raise DataError(
        f"text {files[0].path!r} has no text in field {field!r}, nor has any other file; its string fields are "
        f"{fields.named(names)}: name one of them as text field"
    )


def describe(path: Path, settings: Settings) -> tuple[TextFile, fields.Seen]:
    """Look into a file: how it is read, its field not chosen yet, and what its first records hold. DataError when it is
    empty or damaged."""
    known = format_of(path)
    assert known is not None, "find_files lets only known endings pass"
    kind, named = known
    num_bytes = path.stat().st_size
    seen = fields.Seen(str(path))
    if num_bytes == 0:
        raise DataError(f"text {str(path)!r} is empty (0 bytes); give a file with text in it")
    with path.open("rb") as raw:
        refuse_pointer(raw.read(_BEGIN_BYTES), str(path))
    packer = packer_of(str(path))
    if not packer and named is None and is_parquet(path):
        kind = "parquet"
    if named and not packer:
        raise DataError(
            f"text {str(path)!r} is not packed, though its name ends in {named}; "
            f"name it {path.stem!r} if it is text, or fetch it again"
        )
    file = TextFile(str(path), num_bytes, kind, packer, "utf-8", settings.replace, None, {})
    if kind in _TABLES and packer:
        raise DataError(
            f"text {str(path)!r} is packed with {packer}, though its name says {kind}; unpack it first"
        )
    if kind in _TABLES:
        columns = tables.columns_with_text(file.path, kind)
        file = file._replace(how={"columns": columns})
        _look(file, seen)
        return file, seen
    with open_unpacked(file.path) as stream:
        begin = stream.read(_BEGIN_BYTES)
    refuse_other(begin, file.path)
    file = file._replace(encoding=encoding_of(begin, file.path))
    if kind == "txt":
        by_line = settings.line_documents or _has_no_blank_line(file)
        return file._replace(how={"by_line": by_line}), seen
    if kind == "csv":
        return _describe_csv(file, seen, settings)
    return _describe_json(file, seen, settings)


def _describe_csv(file: TextFile, seen: fields.Seen, settings: Settings) -> tuple[TextFile, fields.Seen]:
    with _utf8(file, lambda place, count: None) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        begin = text.read(csv_rows.BEGIN_CHARACTERS)
        whole = not text.read(1)
    if not begin.strip():
        return file._replace(how={}), seen
    tabs = any(part in Path(file.path).suffixes for part in (".tsv", ".tab"))
    dialect = csv_rows.find_dialect(begin, whole, file.path, tabs, settings.csv, settings.text_field)
    file = file._replace(how={"dialect": list(dialect)})
    _look(file, seen)
    return file, seen


def _describe_json(file: TextFile, seen: fields.Seen, settings: Settings) -> tuple[TextFile, fields.Seen]:
    with _utf8(file, lambda place, count: None) as stream:
        scanner = Scanner(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"), file.path)
        name = file.path.removesuffix(Path(file.path).suffix) if file.packer else file.path
        shape, rows = shape_of(scanner, settings.text_field, name)
    for row in rows:
        seen.add(row)
    file = file._replace(format="json", how={"shape": shape})
    if shape == "values" and file.packer is None and file.encoding == "utf-8":
        with _opened(file) as raw:
            line = next((line for line in iter(lambda: raw.readline(_MAX_LINE), b"") if line.strip()), b"")
        if is_line_of_records(line.decode("utf-8-sig", "replace")):
            file = file._replace(format="jsonl")
    if shape not in ("columns", "lists"):
        _look(file, seen)
    return file, seen


def _look(file: TextFile, seen: fields.Seen) -> None:
    for (_, record), _ in zip(_records(file, lambda place, count: None), range(_PEEK_RECORDS), strict=False):
        seen.add(record)


def units(file: TextFile, number: int) -> list[Unit]:
    """The shares in which file number `number` is read; a function of the file alone."""
    if _in_ranges(file):
        starts = range(0, file.num_bytes, _RANGE_BYTES)
        return [Unit(number, s, min(s + _RANGE_BYTES, file.num_bytes), 0, 1) for s in starts]
    part = _RANGE_BYTES // (8 if file.packer else 2)  # a packed byte is several of text
    num_parts = min(_MAX_PARTS, max(1, math.ceil(file.num_bytes / part)))
    return [Unit(number, 0, file.num_bytes, part, num_parts) for part in range(num_parts)]


def _in_ranges(file: TextFile) -> bool:
    return file.packer is None and file.encoding == "utf-8" and file.format in ("txt", "jsonl")


def read_unit(file: TextFile, unit: Unit) -> Iterator[Item]:
    """The documents of one unit, in file order. DataError names the file and place of damage."""
    if Path(file.path).stat().st_size != file.num_bytes:
        raise changed(file.path)
    noticed: list[Noticed] = []
    told = _teller(unit, noticed)
    if _in_ranges(file):
        items = _read_range(file, unit, told)
    elif file.format == "txt":
        items = _read_lines(file, unit, told)
    else:
        items = _read_records(file, unit, told)
    for item in items:
        yield item
        while noticed:
            yield noticed.pop(0)
    yield from noticed


def _teller(unit: Unit, noticed: list[Noticed]) -> Callable[[int, int], None]:
    def told(at: int, count: int) -> None:
        if unit.part == 0:  # every part reads the whole file
            noticed.append(Noticed(unit.file, f"byte {at}", REPLACED, count))

    return told


def _read_records(file: TextFile, unit: Unit, told: Callable[[int, int], None]) -> Iterator[Item]:
    for position, (place, record) in enumerate(_records(file, told)):
        if position // _GROUP_DOCUMENTS % unit.num_parts == unit.part:
            yield _document(file, unit.file, position, place, record)


def _document(file: TextFile, number: int, position: int, place: str, record: Any) -> Document | LeftOut:
    text = fields.text_of(record, file.field)
    if isinstance(text, str):
        return Document(number, position, text.strip(), place=place)
    return LeftOut(number, place, text.reason)


def _records(file: TextFile, told: Callable[[int, int], None]) -> Iterator[tuple[str, Any]]:
    """(place, record) of all records of a file that is no txt."""
    if file.format in _TABLES:
        for place, record, share in tables.rows(file.path, file.format, file.how["columns"]):
            tell(share)
            yield place, record
        return
    with _utf8(file, told if file.replace else None) as stream:
        if file.format == "csv":
            if "dialect" not in file.how:
                return
            dialect = csv_rows.Dialect(*file.how["dialect"])
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            rows = csv_rows.rows(text, dialect, file.path)
            if file.field not in dialect.columns:
                yield from ((place, dict(zip(dialect.columns, cells, strict=False))) for place, cells in rows)
                return
            index = dialect.columns.index(file.field)
            yield from (
                (place, {file.field: cells[index]} if index < len(cells) else {}) for place, cells in rows
            )
            return
        scanner = Scanner(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"), file.path)
        yield from records(scanner, file.how["shape"], file.field)


def _utf8(file: TextFile, replaced: Callable[[int, int], None] | None) -> IO[bytes]:
    """A file from its start, unpacked, as sound UTF-8. Without `replaced` other bytes are an error."""
    raw = open_unpacked(file.path)
    return io.BufferedReader(Closing(Utf8Stream(raw, file.path, file.encoding, replaced), raw), 1 << 17)


def _opened(file: TextFile) -> IO[bytes]:
    return Path(file.path).open("rb")


def _has_no_blank_line(file: TextFile) -> bool:
    seen, after_blank = 0, False
    with _utf8(file, lambda place, count: None) as raw:
        for line in lines_from(io.BufferedReader(LineEnds(raw)), 0):
            blank = is_blank(line)
            if seen and after_blank and not blank:
                return False
            after_blank = blank
            seen += 0 if blank else len(line.raw)
            if seen > _PEEK_BYTES:
                break
    return True


def _read_lines(file: TextFile, unit: Unit, told: Callable[[int, int], None]) -> Iterator[Item]:
    """The documents of a txt file that is read from its start."""
    number = -1
    with _utf8(file, told if file.replace else None) as raw:
        lines = lines_from(io.BufferedReader(LineEnds(raw)), 0)
        for piece in documents(lines, file.how["by_line"], lambda raw, at: raw.decode("utf-8")):
            number += not piece.continues
            if number // _GROUP_DOCUMENTS % unit.num_parts == unit.part:
                yield Document(unit.file, number, piece.text, piece.continues, f"document {number + 1}")


def _read_range(file: TextFile, unit: Unit, told: Callable[[int, int], None]) -> Iterator[Item]:
    """Documents that start inside [start, stop); the last may reach beyond stop."""
    by_line = file.format == "jsonl" or file.how["by_line"]
    with _opened(file) as raw:
        offset = _first_start(raw, unit.start, file.format, whole_runs=not by_line)
        raw.seek(offset)
        replaced = told if file.replace else None
        if file.format == "jsonl":
            yield from _read_json_lines(file, unit, raw, offset, replaced)
            return
        lines = lines_from(io.BufferedReader(LineEnds(raw)), offset)
        for piece in documents(
            _until(lines, unit.stop, by_line), by_line, lambda raw, at: decoded(raw, file.path, at, replaced)
        ):
            tell((piece.at - unit.start) / (unit.stop - unit.start))
            yield Document(unit.file, piece.at, piece.text, piece.continues, f"byte {piece.at}")


def _read_json_lines(
    file: TextFile, unit: Unit, raw: IO[bytes], offset: int, replaced: Callable[[int, int], None] | None
) -> Iterator[Item]:
    while offset < unit.stop and (line := raw.readline(_MAX_LINE)):
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            raise DataError(
                f"text {file.path!r}, byte {offset}: a record of more than {_MAX_LINE:,} bytes; write it as plain text"
            )
        tell((offset - unit.start) / (unit.stop - unit.start))
        place = f"byte {offset}"
        text = decoded(line, file.path, offset, replaced).removeprefix("\ufeff")
        for number, record in enumerate(values_of_line(text, file.path, place)):
            yield _document(file, unit.file, offset + number, place, record)
        offset += len(line)


def _until(lines: Iterator[Line], stop: int, by_line: bool) -> Iterator[Line]:
    """Lines up to the end of the document that has begun before `stop`."""
    in_run = False
    for line in lines:
        if line.begins and line.at >= stop and (by_line or not in_run):
            return
        in_run = not is_blank(line)
        yield line


def _first_start(raw: IO[bytes], start: int, kind: str, *, whole_runs: bool) -> int:
    """The first line (or, for runs, the first line after a blank one) at or after `start`."""
    if start == 0:
        return 0
    raw.seek(start - 1)
    offset = start - 1
    stream = raw if kind == "jsonl" else io.BufferedReader(LineEnds(raw))
    while line := stream.readline(1 << 20):  # a line that starts exactly at `start` is ours
        offset += len(line)
        if line.endswith(b"\n"):
            break
    if not whole_runs or _blank_before(raw, offset):
        return offset
    raw.seek(offset)
    for found in lines_from(io.BufferedReader(LineEnds(raw)), offset):
        offset = found.at + len(found.raw)
        if is_blank(found):
            break
    return offset


def _blank_before(stream: IO[bytes], offset: int) -> bool:
    """Is the line that ends at `offset` blank?"""
    back = 1 << 12
    while True:
        stream.seek(max(0, offset - back))
        _, newline, line = feeds(stream.read(min(offset, back)))[:-1].rpartition(b"\n")
        if newline or back >= offset or line.strip():
            return not line.strip()
        back *= 16
