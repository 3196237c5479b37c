"""Lines of plain text into documents: runs of lines that a blank line ends, or lines.

Memory holds a piece, however long a line or a document is: long ones come in pieces, cut before white space where
there is some.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

PIECE_BYTES = 1 << 18


class Line(NamedTuple):
    """Bytes of a line from byte `at` on; `begins`: they are its first. Only its last end in a line feed."""

    at: int
    raw: bytes
    begins: bool


class Piece(NamedTuple):
    """A document that begins at byte `at`, or, where it `continues`, a further piece of it."""

    at: int
    text: str
    continues: bool


def lines_from(stream: IO[bytes], at: int) -> Iterator[Line]:
    """The lines of a stream that stands at byte `at`; a long one in pieces that end between characters."""
    rest, begins = b"", True
    while raw := rest + stream.readline(PIECE_BYTES - len(rest)):
        rest = b""
        ends = raw.endswith(b"\n")
        if len(raw) >= PIECE_BYTES and not ends:
            cut = _cut(raw)
            raw, rest = raw[:cut], raw[cut:]
        yield Line(at, raw, begins)
        at += len(raw)
        begins = ends


def _cut(raw: bytes) -> int:
    """Where a piece of a line may end: before its last white space, else between characters."""
    space = max(raw.rfind(b" "), raw.rfind(b"\t"))
    if space > len(raw) // 2:
        return space
    if raw.endswith(b"\r"):
        return len(raw) - 1
    for back in range(1, 5):
        if raw[-back] & 0xC0 != 0x80:  # begins a character
            return len(raw) - back if raw[-back] >= 0xC0 else len(raw)
    return len(raw)


def is_blank(line: Line) -> bool:
    return (
        line.begins
        and not line.raw.strip()
        and (line.raw.endswith(b"\n") or len(line.raw) < PIECE_BYTES // 2)
    )


def documents(lines: Iterable[Line], by_line: bool, decode: Callable[[bytes, int], str]) -> Iterator[Piece]:
    """The documents of lines that follow one another; every line is part of one, or blank. `decode(bytes, at)` gives
    their text."""
    held: list[bytes] = []
    size = held_at = begin = 0
    continues = False

    def piece(last: bool) -> Piece:
        text = decode(b"".join(held), held_at)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = text if continues else text.lstrip()
        return Piece(begin, text.rstrip() if last else text, continues)

    for line in lines:
        blank = is_blank(line)
        if held and line.begins and (blank or by_line):
            yield piece(True)
            held, size, continues = [], 0, False
        if blank:
            continue
        if size >= PIECE_BYTES:
            yield piece(False)
            held, size, continues = [], 0, True
        if not held:
            held_at = line.at
            begin = begin if continues else line.at
        held.append(line.raw)
        size += len(line.raw)
    if held:
        yield piece(True)
