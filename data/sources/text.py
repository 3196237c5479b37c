"""Text files -> documents: txt, json, jsonl, csv, parquet, plain or packed with gz, xz, zst.

What a document is:
  txt      a run of lines, ended by a blank line; in a file whose first 16 MiB have no blank line, each line.
           A run longer than 1 MiB is cut at the next line end, so memory stays bounded.
  jsonl    a line, an object (or a plain string)
  json     an element of the top-level array, or a value of the top-level object (title -> {title, extract,
  …}) csv      a row under a header (a `.tsv` is separated by tabs)
  parquet  a row

Records with several fields give the one named `text_field`, or else the string field that holds the most text
in the file's first records. A unit is the share of a file that one task reads: a byte range where a file can
be entered in the middle (plain txt and jsonl), else every k-th group of documents. A document keeps its
position (byte offset or ordinal), which does not depend on how the file was cut into units.
Left out: markup, languages, de-duplication. Invariant: every record is yielded or counted as empty.
"""

import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zstandard

from data.errors import DataError

FORMATS = {".txt": "txt", ".text": "txt", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
FORMATS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKERS = (".gz", ".xz", ".zst")

MAX_DOCUMENT_BYTES = 1 << 20
_PEEK_BYTES = 16 << 20
_PEEK_RECORDS = 200
_RANGE_BYTES = 8 << 20
_GROUP_DOCUMENTS = 64
_MAX_PARTS = 16  # every part of a file that cannot be entered in the middle reads it from the start


class TextFile(NamedTuple):
    """One input file and how it is read. `field` is None where records are plain text."""

    path: str
    num_bytes: int
    format: str
    packer: str | None
    field: str | None
    by_line: bool
    note: str


class Unit(NamedTuple):
    """The share of file number `file` that one task reads: bytes [start, stop), or part `part` of
    `num_parts`."""

    file: int
    start: int
    stop: int
    part: int
    num_parts: int


class Document(NamedTuple):
    """`position` is a byte offset (unpacked txt and jsonl) or an ordinal; an empty text is counted, not
    used."""

    position: int
    text: str


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
    records = _first_records(file)
    if not records:
        raise DataError(f"text {str(path)!r} holds no records; give a file with text in it")
    if all(isinstance(record, str) for record in records):
        return file._replace(field=None, note="records are plain strings")
    field = text_field or _longest_field(file, records)
    if not any(isinstance(r, dict) and isinstance(r.get(field), str) for r in records):
        names = sorted(
            {name for r in records if isinstance(r, dict) for name, v in r.items() if isinstance(v, str)}
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
            for position, record in enumerate(_records(file)):
                if position // _GROUP_DOCUMENTS % unit.num_parts == unit.part:
                    yield Document(position, _text_of(record, file.field))
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
        return [record for record, _ in zip(_records(file), range(_PEEK_RECORDS), strict=False)]
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
        with _open(file) as stream:
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


def _open(file: TextFile) -> IO[bytes]:
    """The unpacked bytes of a file as a stream."""
    if file.packer == ".gz":
        return cast(IO[bytes], gzip.open(file.path, "rb"))
    if file.packer == ".xz":
        return cast(IO[bytes], lzma.open(file.path, "rb"))
    if file.packer == ".zst":
        return io.BufferedReader(_Zstd(Path(file.path).open("rb")), buffer_size=1 << 20)
    return Path(file.path).open("rb")


class _Zstd(io.RawIOBase):
    """Unpacked zstandard frames; a file that ends inside a frame is an EOFError (the library's reader is
    silent)."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self._packed, self._ready = raw, b"", b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstandard frame")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = frame.decompress(packed)
            self._packed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _records(file: TextFile) -> Iterator[Any]:
    """Every record of a file from its start: texts, or objects with named fields."""
    if file.format == "parquet":
        yield from _parquet(file)
        return
    with _open(file) as stream:
        if file.format == "txt":
            lines = _with_offsets(stream, 0)
            yield from (text for _, text in _documents_of_lines(lines, file.by_line))
        elif file.format == "jsonl":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_line(file, line, f"line {number}")
        elif file.format == "json":
            yield from _json_elements(file, io.TextIOWrapper(stream, encoding="utf-8-sig"))
        else:
            csv.field_size_limit(1 << 30)
            delimiter = "\t" if ".tsv" in Path(file.path).suffixes else ","
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            yield from csv.DictReader(text, delimiter=delimiter)


def _parquet(file: TextFile) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            columns = [file.field] if file.field in table.schema_arrow.names else None
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"text {file.path!r} is damaged or no parquet file ({_line(error)}); fetch it again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _with_offsets(lines: Iterable[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    for line in lines:
        yield start, line
        start += len(line)


def _documents_of_lines(lines: Iterable[tuple[int, bytes]], by_line: bool) -> Iterator[tuple[int, str]]:
    """Group (offset, line) pairs into (offset, document); every pair ends up in one document or is blank."""
    start, held_bytes = 0, 0
    held: list[bytes] = []
    for offset, line in lines:
        blank = not line.strip()
        if held and (blank or by_line or held_bytes >= MAX_DOCUMENT_BYTES):
            yield start, _decode(held)
            held, held_bytes = [], 0
        if not blank:
            start = start if held else offset
            held.append(line)
            held_bytes += len(line)
    if held:
        yield start, _decode(held)


def _decode(lines: list[bytes]) -> str:
    return b"".join(lines).decode("utf-8-sig").strip()


def _read_range(file: TextFile, unit: Unit) -> Iterator[Document]:
    """Documents that start inside [start, stop); the last may reach beyond stop."""
    with Path(file.path).open("rb") as stream:
        offset = _first_start(stream, unit.start, whole_runs=file.format == "txt" and not file.by_line)
        lines = _with_offsets(stream, offset)
        if file.format == "jsonl":
            for offset, line in lines:
                if offset >= unit.stop:
                    return
                if line.strip():
                    record = _json_line(file, line, f"byte {offset}")
                    yield Document(offset, _text_of(record, file.field))
            return
        yield from _runs_in_range(lines, unit.stop, file.by_line)


def _runs_in_range(lines: Iterator[tuple[int, bytes]], stop: int, by_line: bool) -> Iterator[Document]:
    """Runs of lines whose first line starts before `stop`; a run cut at 1 MiB counts as one run here."""

    def until_stop() -> Iterator[tuple[int, bytes]]:
        in_run = False
        for offset, line in lines:
            if offset >= stop and (by_line or not in_run):
                return
            in_run = bool(line.strip())
            yield offset, line

    for offset, text in _documents_of_lines(until_stop(), by_line):
        yield Document(offset, text)


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


def _json_line(file: TextFile, line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(
            f"text {file.path!r}, {place}: not JSON ({error}); mend or remove that line"
        ) from error


def _json_elements(file: TextFile, stream: IO[str]) -> Iterator[Any]:
    """The elements of a top-level array or object, read piece by piece: memory holds one element, not the
    file."""
    decoder, buffer, at, wants = json.JSONDecoder(), "", 0, 1 << 16

    def more() -> bool:
        nonlocal buffer, at, wants
        piece = stream.read(wants)
        buffer, at = buffer[at:] + piece, 0
        wants = min(wants * 2, 1 << 24)
        return bool(piece)

    def skip(characters: str) -> str:
        """Step over `characters`; the next one after them, '' at the end of the file."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in characters:
                at += 1
            if at < len(buffer):
                return buffer[at]
            if not more():
                return ""

    def value() -> Any:
        nonlocal at, wants
        while True:
            try:
                found, end = decoder.raw_decode(buffer, at)
                if end < len(buffer):
                    at, wants = end, 1 << 16
                    return found
                if not more():  # else a number could go on behind the buffer's end: decode it again
                    at = len(buffer)
                    return found
            except ValueError as error:
                if not more():
                    raise DataError(
                        f"text {file.path!r}: not JSON ({_line(error)}); fetch it again"
                    ) from error

    blank = " \t\r\n"
    opening = skip(blank)
    if opening not in ("[", "{"):
        raise DataError(
            f"text {file.path!r}: a JSON array or object is expected; got {opening or 'nothing'!r}"
        )
    at += 1
    closing = "]" if opening == "[" else "}"
    while (next_one := skip(blank + ",")) != closing:
        if not next_one:
            raise DataError(
                f"text {file.path!r} is cut short: its {opening!r} is never closed; fetch it again"
            )
        if opening == "{":
            value()
            if skip(blank) != ":":
                raise DataError(f"text {file.path!r}: not JSON (':' expected behind a name); fetch it again")
            at += 1
            skip(blank)
        yield value()
