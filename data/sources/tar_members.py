"""The members of a tar, one after the other, from a stream: every header is checked, whatever lies between them.

`tarfile` takes a damaged or zeroed header for the end of the archive (cpython#120740) and drops the rest without a
word. Here that is an error with its byte. Read are USTAR, old GNU and PAX headers with their long names and sizes, the
headers of sparse members, and archives one after another. An archive ends with two blocks of zeros, or with one at
the very end of the file.
"""

import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from minilm.data.errors import DataError
from minilm.data.records.encoding import Readable

_BLOCK = 512
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    b"S": "sparse file",
    b"D": "folder",
    b"V": "label",
}


class Member(NamedTuple):
    """One member: `at` is the byte of its header; `read()` gives its bytes, until the next member is asked for;
    `archive` counts the archives in the file."""

    name: str
    kind: str
    target: str
    at: int
    archive: int
    read: Callable[[], bytes]


def members(stream: Readable, path: str) -> Iterator[Member]:
    """All members of the tar `stream`, which errors call `path`. DataError at a damaged header, at an end in the
    middle, and for a name that an archive has twice."""
    reader = _Blocks(stream)
    archive, ended, last = 0, False, ""
    extended: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    seen: dict[str, int] = {}
    while True:
        at = reader.at
        header = reader.take(_BLOCK)
        if not header and ended:
            return
        if len(header) < _BLOCK and not (ended and not header.strip(b"\0")):
            raise DataError(f"{path!r} is cut short behind {last!r}, at byte {reader.at}; fetch it again")
        if not header.strip(b"\0"):
            if not ended and reader.take(_BLOCK).strip(b"\0"):
                raise DataError(
                    f"{path!r} is damaged at byte {at} (a lone block of zeros, where {last!r} is followed by a "
                    "member or the end); fetch it again"
                )
            ended = True
            continue
        if ended:
            archive, ended, seen, everywhere = archive + 1, False, {}, {}
        info = _parse(header, path, at)
        if info.type in (b"x", b"g", b"X", b"L", b"K"):
            raw = reader.take_padded(info.size)
            if len(raw) < info.size:
                raise DataError(f"{path!r} is cut short behind {last!r}, at byte {reader.at}; fetch it again")
            if info.type in (b"L", b"K"):
                extended["path" if info.type == b"L" else "linkpath"] = _text(raw.rstrip(b"\0"))
            else:
                (everywhere if info.type == b"g" else extended).update(_pax(raw, path, at))
            continue
        if info.type not in _KINDS:
            raise DataError(
                f"{path!r}, at byte {at}: member {info.name!r} is of a kind that is not read ({info.type!r}, such as a "
                "part of several volumes); write it as one plain tar"
            )
        pax, extended = everywhere | extended, {}
        sparse = info.type == b"S" or any(key.startswith("GNU.sparse.") for key in pax)
        more = info.type == b"S" and header[482] != 0
        while more:
            more = reader.take(_BLOCK)[504:505] not in (b"", b"\0")
        name = pax.get("GNU.sparse.name") or pax.get("path") or info.name
        size = 0
        if _KINDS[info.type] in ("file", "sparse file") or info.type == b"D":
            size = int(pax["size"]) if pax.get("size", "").isdigit() else info.size
        last = name
        if name in seen and _KINDS[info.type] != "folder":
            raise DataError(
                f"{path!r} holds {name!r} twice, at bytes {seen[name]} and {at}; which one counts is not clear: write "
                "it again with one of them"
            )
        seen[name] = at
        begin = reader.at
        kind = "sparse file" if sparse else _KINDS[info.type]
        target = pax.get("linkpath") or info.linkname
        yield Member(name, kind, target, at, archive, partial(reader.take, size))
        reader.skip(begin + -(-size // _BLOCK) * _BLOCK - reader.at)
        if reader.at < begin + size:
            raise DataError(f"{path!r} is cut short behind {last!r}, at byte {reader.at}; fetch it again")


def _parse(header: bytes, path: str, at: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.HeaderError(f"size {info.size}")
    except tarfile.HeaderError as error:
        if at == 0:
            raise DataError(f"{path!r} is no tar, or is damaged at byte 0 ({error}); give a tar") from error
        raise DataError(f"{path!r} is damaged at byte {at} ({error}); fetch it again") from error
    return info


def _pax(raw: bytes, path: str, at: int) -> dict[str, str]:
    """The records of an extended header: `length key=value`, a line each."""
    found, rest = {}, raw
    while rest.strip(b"\0"):
        number, _, _ = rest.partition(b" ")
        length = int(number) if number.isdigit() and len(number) < 12 else 0
        record = rest[len(number) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (0 < length <= len(rest) and equals and value.endswith(b"\n")):
            raise DataError(f"{path!r} is damaged at byte {at} (its extended header); fetch it again")
        found[_text(key)], rest = _text(value[:-1]), rest[length:]
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


class _Blocks:
    """A stream that says how far it was read."""

    def __init__(self, stream: Readable):
        self._stream, self.at = stream, 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or all that are left."""
        parts, left = [], size
        while left and (piece := self._stream.read(min(left, 1 << 20))):
            parts.append(piece)
            left -= len(piece)
        self.at += size - left
        return b"".join(parts)

    def take_padded(self, size: int) -> bytes:
        return self.take(-(-size // _BLOCK) * _BLOCK)[:size]

    def skip(self, size: int) -> None:
        while size > 0 and (count := len(self.take(min(size, 1 << 20)))):
            size -= count
