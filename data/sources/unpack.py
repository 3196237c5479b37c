"""A packed stream (gzip, xz, zstd, bzip2; known by its first bytes) unpacked strictly, front to back.

Every member, stream and frame is read, and the zero bytes that may legally follow one. Anything else after it, and an
end in the middle of one, is an error: the standard library's readers drop what follows without a word.
"""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import zstandard

from minilm.data.errors import DataError
from minilm.data.records.encoding import Readable
from minilm.data.sources.progress import tell

BUFFER_BYTES = 1 << 17
_MOST = 1 << 20  # bytes that are unpacked at once, however small their packed form
_ZSTD_PIECE = 1 << 11  # its library has no such bound; four bytes can be a block of 128 KiB
_MAGICS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b\x08": lambda: zlib.decompressobj(31),
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    b"BZh": bz2.BZ2Decompressor,
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
_NAMES = {b"\x1f\x8b\x08": "gzip", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_LONGEST = 10
_ZSTD = b"\x28\xb5\x2f\xfd"
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a block, and the end of an empty file
_PADDING = {b"\x1f\x8b\x08": 1, b"\xfd7zXZ\x00": 4}  # zeros that may follow come in multiples of this
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1-3 of a zstd frame that holds nothing


def open_unpacked(path: str) -> io.BufferedReader:
    """The unpacked bytes of a file, whatever it is packed with; it tells how much of the file was read."""
    file = io.BufferedReader(_TellingFile(path), buffer_size=BUFFER_BYTES)
    return io.BufferedReader(Closing(unpacked_stream(file, path), file), buffer_size=1 << 20)


def packer_of(path: str) -> str | None:
    """gzip, xz, bzip2 or zstd: what the first bytes of a file say that it is packed with."""
    with Path(path).open("rb") as file:
        magic = _magic_of(file.read(_LONGEST))
    return None if magic is None else _NAMES[magic]


def unpacked_stream(raw: Readable, name: str) -> Readable:
    """`raw`, whatever it is packed with; the stream itself where it is not. Errors call it `name`."""
    begin = _read_exactly(raw, _LONGEST)
    whole = _Rest(begin, raw)
    magic = _magic_of(begin)
    if magic is None:
        return whole
    return _Unpacked(whole, name, magic)


def _magic_of(begin: bytes) -> bytes | None:
    if begin[1:4] == _SKIPPABLE and begin[0] & 0xF0 == 0x50:
        return _ZSTD
    if begin.startswith(b"BZh") and begin[4:10] not in _BZIP2_BLOCKS:  # words may begin with these letters
        return None
    return next((magic for magic in _MAGICS if begin.startswith(magic)), None)


def _read_exactly(raw: Readable, size: int) -> bytes:
    found = b""
    while len(found) < size and (piece := raw.read(size - len(found))):
        found += piece
    return found


class _TellingFile(io.FileIO):
    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        tell(self.tell() / max(1, os.fstat(self.fileno()).st_size))
        return count


class Closing(io.RawIOBase):
    """A stream that closes the file under it."""

    def __init__(self, stream: Any, file: IO[bytes]):
        self._stream, self._file = stream, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Rest(io.RawIOBase):
    """Bytes that were read already, then the rest of their stream."""

    def __init__(self, begin: bytes, raw: Readable):
        self._begin, self._raw = begin, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._begin[: len(buffer)] or self._raw.read(len(buffer)) or b""
        self._begin = self._begin[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


class _Unpacked(io.RawIOBase):
    def __init__(self, raw: _Rest, name: str, magic: bytes):
        self._raw, self._name, self._magic = raw, name, magic
        self._unpacker = _MAGICS[magic]()
        self._packed = b""  # read and not unpacked yet
        self._at = 0  # bytes read from `raw`
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._unpacker.eof and not self._next_part():
                return 0
            if not self._packed and self._needs_input() and not self._more():
                raise DataError(f"{self._name!r} is cut short at byte {self._at}; fetch it again")
            try:
                self._ready = memoryview(self._unpack())
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
                raise DataError(
                    f"{self._name!r} is damaged before byte {self._at} ({error}); fetch it again"
                ) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _needs_input(self) -> bool:
        return getattr(self._unpacker, "needs_input", True)

    def _unpack(self) -> bytes:
        """Some of what is next; what `_packed` holds of it is used up."""
        unpacker = self._unpacker
        found: bytes = unpacker.decompress(self._packed, *([] if self._magic == _ZSTD else [_MOST]))
        self._packed = unpacker.unused_data if unpacker.eof else getattr(unpacker, "unconsumed_tail", b"")
        return found

    def _more(self) -> bool:
        piece = self._raw.read(_ZSTD_PIECE if self._magic == _ZSTD else BUFFER_BYTES) or b""
        self._packed += piece
        self._at += len(piece)
        return bool(piece)

    def _next_part(self) -> bool:
        """Go to the next member. False at the end of the file."""
        zeros = 0
        while True:
            left = self._packed.lstrip(b"\0")
            zeros, self._packed = zeros + len(self._packed) - len(left), left
            if self._packed or not self._more():
                break
        while len(self._packed) < _LONGEST and self._more():
            pass
        if zeros % _PADDING.get(self._magic, zeros + 1) or (
            self._packed and _magic_of(self._packed) != self._magic
        ):
            at = self._at - len(self._packed) - zeros
            raise DataError(
                f"{self._name!r}: what follows at byte {at} is no further packed part; remove it, or fetch it again"
            )
        self._unpacker = _MAGICS[self._magic]() if self._packed else self._unpacker
        return bool(self._packed)
