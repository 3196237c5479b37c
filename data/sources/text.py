"""Text files -> documents: txt, json, jsonl, csv, parquet, plain or packed with gz, xz, zst.

What a document is:
  txt      a run of lines, ended by a blank line; in a file whose first 16 MiB have no blank line, each line.
           A run longer than 1 MiB is cut at the next line end, so memory stays bounded.
  jsonl    a line, an object (or a plain string)
  json     an element of the top-level array, or a value of the top-level object (title -> {title, …})
  csv      a row under a header (a `.tsv` is separated by tabs)
  parquet  a row

Records with several fields give the one named `text_field`, or else the string field that holds the most text
in the file's first records. A unit is the share of a file that one task reads: a byte range where a file can
be entered in the middle (plain txt and jsonl), else every k-th group of documents. A document keeps its
position (byte offset or ordinal), which does not depend on how the file was cut into units.
Left out: markup, languages, de-duplication. Invariant: every record is yielded or counted as empty.
"""

import csv
import gzip
import lzma
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from minilm.data.errors import DataError
from minilm.data.sources.plugin import Document, Plan, take
from minilm.data.sources.progress import tell
from minilm.data.sources.text_formats import (
    TextFile,
    documents_of_lines,
    json_line,
    records,
    unpacked,
    with_offsets,
)

FORMATS = {".txt": "txt", ".text": "txt", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
FORMATS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKERS = (".gz", ".xz", ".zst")

_PEEK_BYTES = 16 << 20
_PEEK_RECORDS = 200
_RANGE_BYTES = 8 << 20
_GROUP_DOCUMENTS = 64
_MAX_PARTS = 16  # every part of a file that cannot be entered in the middle reads it from the start


class Unit(NamedTuple):
    """The share of file number `file` that one task reads: bytes [start, stop), or part `part` of
    `num_parts`."""

    file: int
    start: int
    stop: int
    part: int
    num_parts: int


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    """The source "text": files, how each is read, and their units. Option: text_field."""
    [text_field] = take(options, "text", "text_field")
    files = [describe(path, text_field) for path in find_files(inputs)]
    every = [unit for number, file in enumerate(files) for unit in units(file, number)]
    notes = [f"{file.path}: {file.note}" for file in files]
    return Plan(
        [list(file) for file in files], [list(unit) for unit in every], [f.path for f in files], notes
    )


def read(spec: Any, unit: Any) -> Iterator[Document]:
    """The documents of one unit."""
    share = Unit(*unit)
    return read_unit(TextFile(*spec[share.file]), share)


def documents(inputs: Sequence[str | Path], text_field: str | None) -> Iterator[str]:
    """The text of every document of `inputs`, file by file; a file is looked at when its turn comes."""
    for path in find_files(inputs):
        file = describe(path, text_field)
        for document in read_unit(file, Unit(0, 0, file.num_bytes, 0, 1)):
            assert isinstance(document.content, str)
            yield document.content


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` (files, folders, glob patterns) name, in the order given, each once."""
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and _format_of(p) is not None)
        else:
            matches = sorted(p for p in _glob(path) if p.is_file())
        if not matches:
            raise DataError(
                f"text {str(given)!r} does not exist; give files, folders or patterns that match text files"
            )
        for match in matches:
            if _format_of(match) is None:
                allowed = " ".join(sorted(FORMATS))
                raise DataError(
                    f"text {str(match)!r} has an ending that is not known; allowed: {allowed}, "
                    f"each also with {' '.join(PACKERS)}"
                )
            found[match.absolute()] = None
    if not found:
        raise DataError("no text was given; name at least one file, folder or pattern")
    return list(found)


def _glob(pattern: Path) -> Iterator[Path]:
    if not any(c in str(pattern) for c in "*?["):
        return iter(())
    anchor = Path(pattern.anchor) if pattern.anchor else Path()
    return anchor.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern))


def _format_of(path: Path) -> tuple[str, str | None] | None:
    packer = path.suffix if path.suffix in PACKERS else None
    inner = Path(path.stem).suffix if packer else path.suffix
    kind = FORMATS.get(inner.lower())
    return (kind, packer) if kind and not (packer and kind == "parquet") else None


def describe(path: Path, text_field: str | None) -> TextFile:
    """Look into a file and decide how it is read. DataError when it is empty, damaged or lacks
    `text_field`."""
    kind_packer = _format_of(path)
    assert kind_packer is not None, "find_files lets only known endings pass"
    kind, packer = kind_packer
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise DataError(f"text {str(path)!r} is empty (0 bytes); give a file with text in it")
    file = TextFile(str(path), num_bytes, kind, packer, text_field, False, "")
    if kind == "txt":
        by_line = _has_no_blank_line(file)
        note = "a line is a document (no blank lines)" if by_line else "a blank line ends a document"
        return file._replace(field=None, by_line=by_line, note=note)
    first = _first_records(file)
    if not first:
        raise DataError(f"text {str(path)!r} holds no records; give a file with text in it")
    if all(isinstance(record, str) for record in first):
        return file._replace(field=None, note="records are plain strings")
    field = text_field or _longest_field(file, first)
    if not any(isinstance(r, dict) and isinstance(r.get(field), str) for r in first):
        names = sorted(
            {name for r in first if isinstance(r, dict) for name, v in r.items() if isinstance(v, str)}
        )
        raise DataError(
            f"text {str(path)!r} has no text in field {field!r}; its string fields are "
            f"{', '.join(names) or 'none'}: "
            "name one of them as text field"
        )
    chosen = "as asked" if text_field else "the string field with the most text"
    return file._replace(field=field, note=f"text from field {field!r} ({chosen})")


def units(file: TextFile, number: int) -> list[Unit]:
    """The shares in which file number `number` is read; a function of the file alone."""
    if file.packer is None and file.format in ("txt", "jsonl"):
        starts = range(0, file.num_bytes, _RANGE_BYTES)
        return [Unit(number, s, min(s + _RANGE_BYTES, file.num_bytes), 0, 1) for s in starts]
    num_parts = min(_MAX_PARTS, max(1, math.ceil(file.num_bytes / (_RANGE_BYTES // 8))))
    return [Unit(number, 0, file.num_bytes, part, num_parts) for part in range(num_parts)]


def read_unit(file: TextFile, unit: Unit) -> Iterator[Document]:
    """The documents of one unit, in file order. DataError names the file and place of damage."""
    try:
        if file.packer is None and file.format in ("txt", "jsonl"):
            yield from _read_range(file, unit)
        else:
            for position, record in enumerate(records(file)):
                if position // _GROUP_DOCUMENTS % unit.num_parts == unit.part:
                    yield Document(unit.file, position, _text_of(record, file.field))
    except UnicodeDecodeError as error:
        raise DataError(
            f"text {file.path!r} is not UTF-8 ({error.reason} in "
            f"{error.object[error.start : error.start + 4]!r}); "
            "convert it first, for instance with iconv -t UTF-8"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, csv.Error) as error:
        raise DataError(f"text {file.path!r} is damaged or cut short ({error}); fetch it again") from error


def _text_of(record: Any, field: str | None) -> str:
    if field is not None and isinstance(record, dict):
        record = record.get(field)
    return record.strip() if isinstance(record, str) else ""


def _first_records(file: TextFile) -> list[Any]:
    whole = Unit(0, 0, file.num_bytes, 0, 1)
    try:
        return [record for record, _ in zip(records(file), range(_PEEK_RECORDS), strict=False)]
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, UnicodeDecodeError):
        list(read_unit(file, whole))  # says it properly
        raise


def _longest_field(file: TextFile, records: list[Any]) -> str:
    lengths: dict[str, int] = {}
    for record in records:
        for name, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, str):
                lengths[name] = lengths.get(name, 0) + len(value)
    if not lengths:
        raise DataError(
            f"text {file.path!r} has records without any string field; give a file with text in it"
        )
    return max(sorted(lengths), key=lambda name: lengths[name])


def _has_no_blank_line(file: TextFile) -> bool:
    seen, after_blank = 0, False
    try:
        with unpacked(file) as stream:
            for line in stream:
                blank = not line.strip()
                if seen and after_blank and not blank:
                    return False
                after_blank = blank
                seen += 0 if blank else len(line)
                if seen > _PEEK_BYTES:
                    break
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"text {file.path!r} is damaged or cut short ({error}); fetch it again") from error
    return True


def _read_range(file: TextFile, unit: Unit) -> Iterator[Document]:
    """Documents that start inside [start, stop); the last may reach beyond stop."""
    with Path(file.path).open("rb") as stream:
        offset = _first_start(stream, unit.start, whole_runs=file.format == "txt" and not file.by_line)
        lines = with_offsets(stream, offset)
        if file.format == "jsonl":
            for offset, line in lines:
                if offset >= unit.stop:
                    return
                tell((offset - unit.start) / (unit.stop - unit.start))
                if line.strip():
                    record = json_line(file, line, f"byte {offset}")
                    yield Document(unit.file, offset, _text_of(record, file.field))
            return
        for position, document in _runs_in_range(lines, unit.stop, file.by_line):
            tell((position - unit.start) / (unit.stop - unit.start))
            yield Document(unit.file, position, document)


def _runs_in_range(lines: Iterator[tuple[int, bytes]], stop: int, by_line: bool) -> Iterator[tuple[int, str]]:
    """Runs of lines whose first line starts before `stop`; a run cut at 1 MiB counts as one run here."""

    def until_stop() -> Iterator[tuple[int, bytes]]:
        in_run = False
        for offset, line in lines:
            if offset >= stop and (by_line or not in_run):
                return
            in_run = bool(line.strip())
            yield offset, line

    return documents_of_lines(until_stop(), by_line)


def _first_start(stream: IO[bytes], start: int, *, whole_runs: bool) -> int:
    """Move `stream` to the first line (or, for runs, the first line after a blank one) at or after
    `start`."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    offset = start - 1 + len(stream.readline())  # a line that starts exactly at `start` is ours
    if not whole_runs:
        return offset
    if _blank_before(stream, offset):
        return offset
    for line in stream:
        offset += len(line)
        if not line.strip():
            return offset
    return offset


def _blank_before(stream: IO[bytes], offset: int) -> bool:
    """Is the line that ends at `offset` blank? Leaves the stream at `offset`."""
    back = 1 << 12
    while True:
        stream.seek(max(0, offset - back))
        _, newline, line = stream.read(min(offset, back))[:-1].rpartition(b"\n")
        if newline or back >= offset:
            return not line.strip()
        back *= 16
