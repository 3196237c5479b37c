"""The insides of text files: records of every format, runs of lines.

Records are texts, or objects with named fields. Memory holds one record, whatever the file: JSON is decoded piece
by piece.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from minilm.data.errors import DataError, one_line
from minilm.data.sources.progress import tell
from minilm.data.sources.unpack import open_unpacked

MAX_DOCUMENT_BYTES = 1 << 20


class TextFile(NamedTuple):
    """One input file and how it is read. `packer` is what its bytes are packed with, `field` is None where records are
    plain text."""

    path: str
    num_bytes: int
    format: str
    packer: str | None
    field: str | None
    by_line: bool
    note: str


def records(file: TextFile) -> Iterator[Any]:
    """Every record of a file from its start: texts, or objects with named fields."""
    if file.format == "parquet":
        yield from _parquet(file)
        return
    with open_unpacked(file.path) as stream:
        if file.format == "txt":
            lines = with_offsets(stream, 0)
            yield from (text for _, text in documents_of_lines(lines, file.by_line))
        elif file.format == "jsonl":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield json_line(file, line, f"line {number}")
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
            done = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
                done += batch.num_rows
                tell(done / table.metadata.num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"text {file.path!r} is damaged or no parquet file ({one_line(error)}); fetch it again"
        ) from error


def with_offsets(lines: Iterable[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    for line in lines:
        yield start, line
        start += len(line)


def documents_of_lines(lines: Iterable[tuple[int, bytes]], by_line: bool) -> Iterator[tuple[int, str]]:
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


def json_line(file: TextFile, line: bytes, place: str) -> Any:
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
                        f"text {file.path!r}: not JSON ({one_line(error)}); fetch it again"
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
