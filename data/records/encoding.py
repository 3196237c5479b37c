"""What a text file's bytes are encoded in, and the file as a stream of sound UTF-8.

UTF-16 and UTF-32 are known by their byte order mark. Bytes that are no text in the encoding are an error with their
place, or replaced by U+FFFD and counted, as the caller asks. Left out: guessing of 8-bit encodings.
"""

import codecs
import io
import re
from collections.abc import Callable
from typing import Any, Protocol

from minilm.data.errors import DataError

_PIECE = 1 << 17
_MARKS = (  # UTF-32's little-endian mark begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_NUL_SHARE = 0.1
REPLACEMENT = "\ufffd"
_LONE_RETURN = re.compile(rb"\r(?!\n)")


class Readable(Protocol):
    """A stream of bytes; `read` may give less than was asked for, at the end nothing."""

    def read(self, size: int, /) -> bytes | None: ...


def _some(raw: Readable) -> bytes:
    """What one read gives, so that progress is told in between."""
    return getattr(raw, "read1", raw.read)(_PIECE) or b""


def refuse_pointer(begin: bytes, name: str) -> None:
    """DataError when a file that begins with these bytes is git-lfs's stand-in for the file."""
    if begin.startswith(_LFS):
        raise DataError(f"{name!r} is a git-lfs pointer, not the file itself; fetch that with: git lfs pull")


def encoding_of(begin: bytes, name: str) -> str:
    """utf-8, utf-16 or utf-32, by the first bytes. DataError for what is no text."""
    for mark, encoding in _MARKS:
        if begin.startswith(mark):
            return encoding
    if begin.count(0) > _MAX_NUL_SHARE * len(begin):
        raise DataError(
            f"{name!r} is no text in UTF-8 ({begin.count(0)} of its first {len(begin)} bytes are zero); if it is "
            "UTF-16, convert it: iconv -f UTF-16LE -t UTF-8"
        )
    return "utf-8"


def not_utf8(name: str, at: int, raw: bytes, encoding: str = "utf-8") -> DataError:
    """What is said of bytes that are no text; `at` is their place in the unpacked file."""
    return DataError(
        f"text {name!r} is not {encoding.upper()} at byte {at} ({raw[:4]!r}); convert it first, for instance with "
        f"iconv -t UTF-8, or have such bytes replaced and counted: --invalid-utf8 replace "
        "(in a recipe data.invalid_utf8: replace)"
    )


def decoded(raw: bytes, name: str, at: int, replaced: Callable[[int, int], None] | None) -> str:
    """`raw`, which stands at byte `at`, as text. `replaced(byte, count)` is told of bytes that were replaced by
    U+FFFD; where it is None they are a DataError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if replaced is None:
            raise not_utf8(name, at + error.start, raw[error.start :]) from None
        text = raw.decode("utf-8", "replace")
        replaced(at + error.start, text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode()))
        return text


class Utf8Stream(io.RawIOBase):
    """A stream in `encoding` as sound UTF-8 without its byte order mark."""

    def __init__(self, raw: Readable, name: str, encoding: str, replaced: Callable[[int, int], None] | None):
        self._raw, self._name, self._encoding, self._replaced = raw, name, encoding, replaced
        self._decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
        self._at = 0  # of the next byte that is read
        self._held = b""  # read, not decoded yet
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            piece = _some(self._raw)
            self._ended = not piece
            self._ready = memoryview(self._decode(piece).encode("utf-8", "replace"))
            self._at += len(piece)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decode(self, piece: bytes) -> str:
        state = self._decoder.getstate()
        try:
            return self._decoder.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._at - len(state[0]) + error.start
            if self._replaced is None:
                raise not_utf8(self._name, at, error.object[error.start :], self._encoding) from None
            self._decoder.setstate(state)
            self._decoder.errors = "replace"
            text = self._decoder.decode(piece, final=self._ended)
            self._decoder.errors = "strict"
            own = piece.count(REPLACEMENT.encode()) if self._encoding == "utf-8" else 0
            self._replaced(at, max(1, text.count(REPLACEMENT) - own))
            return text


class LineEnds(io.RawIOBase):
    """A stream in which a carriage return alone, an old line end, is a line feed; no byte moves."""

    def __init__(self, raw: Readable):
        self._raw, self._held = raw, b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = _some(self._raw)
            whole = self._held + piece
            if not whole:
                return 0
            self._held = b""
            if piece and whole.endswith(b"\r"):  # a line feed may follow
                whole, self._held = whole[:-1], b"\r"
            self._ready = memoryview(feeds(whole))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def feeds(raw: bytes) -> bytes:
    """`raw` with line feeds for carriage returns that stand alone."""
    return _LONE_RETURN.sub(b"\n", raw) if b"\r" in raw else raw
