"""The index files of Megatron and fairseq (`.idx` beside `.bin`), parsed strictly; all numbers little-endian.

    fairseq    4D 4D 49 44 49 44 58 00 00 · u64 version 1 · u8 dtype · u64 n · i32 sizes[n] · i64 pointers[n]
    Megatron   the same up to n · u64 d · i32 lengths[n] · i64 pointers[n] · i64 document indices[d] · [i8 modes[n]]
    legacy     54 4E 54 49 44 58 00 00 · u64 version 1 · u64 dtype · u64 element bytes · u64 n · u64 s ·
               i64 dim offsets[n+1] · i64 data offsets[n+1] (in elements) · i64 sizes[s]; values are stored + 1

The first two share magic and version and are told apart by the file's size. Every pointer is checked against the
size of the `.bin`.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.sources.find import at_home

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FAIRSEQ_ONLY = {9: "<u4", 10: "<u8"}
_COMMON = struct.Struct("<9sQBQ")


class Index(NamedTuple):
    """`lengths` [n] in tokens, `starts` [n] in tokens from the begin of the `.bin`; `documents` [d + 1] are
    bounds of documents in sequences, None where the format has none. `shift` is added to every stored value."""

    prefix: str
    layout: str
    dtype: str
    lengths: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64] | None
    shift: int

    def tokens(self) -> "TokenFile":
        """The tokens of the `.bin`, `shift` not yet added."""
        return TokenFile(self.prefix + ".bin", np.dtype(self.dtype))


class TokenFile:
    """Tokens of an open `.bin`, as stored. Read, not mapped: a file that is cut meanwhile is an error, not a signal."""

    def __init__(self, path: str, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, start: int, length: int) -> npt.NDArray:
        """The `length` tokens from number `start` on. DataError where they are not all there."""
        width = self._dtype.itemsize
        tokens = np.empty(length, self._dtype)
        into, at = tokens.view(np.uint8).data, start * width
        try:
            while len(into) and (count := os.preadv(self._file, [into], at)):
                into, at = into[count:], at + count
        except OSError as error:
            raise DataError(
                f"{self._path!r}, at byte {at}: its bytes cannot be read ({error.strerror}); put the file back and run "
                "the same command again"
            ) from error
        if len(into):
            raise DataError(
                f"{self._path!r} is cut short at byte {at}, though it was longer before; put the file back and run the "
                "same command again"
            )
        return tokens


def clean_prefix(given: str | Path) -> str:
    """PREFIX of PREFIX, PREFIX.idx or PREFIX.bin. DataError unless both files are there."""
    prefix = str(at_home(given).absolute())
    prefix = prefix[:-4] if prefix.endswith((".idx", ".bin")) else prefix
    for ending in (".idx", ".bin"):
        if not Path(prefix + ending).is_file():
            raise DataError(
                f"{prefix + ending!r} is missing; name the common prefix of a .bin and an .idx file"
            )
    return prefix


def read_once(inputs: Sequence[str | Path], layout: str) -> tuple[list[Index], list[str]]:
    """The indices of all pairs, each pair once however often it is named, and a note for every other time."""
    indices: list[Index] = []
    notes: list[str] = []
    first: dict[tuple[int, int, bytes], str] = {}
    for given in inputs:
        prefix = clean_prefix(given)
        stat = Path(prefix + ".bin").stat()
        key = (stat.st_dev, stat.st_ino, hashlib.sha256(Path(prefix + ".idx").read_bytes()).digest())
        if key in first:
            notes.append(f"{given}: the same pair as {first[key]}, taken once")
            continue
        first[key] = str(given)
        indices.append(read_index(prefix, layout))
    if not indices:
        raise DataError("no .bin/.idx pair was given; name at least one prefix")
    if not any(len(index.lengths) for index in indices):
        raise DataError(
            f"{indices[0].prefix + '.idx'!r} holds no sequences: the text that it was made from was empty; "
            "run the program that wrote it again"
        )
    return indices, notes


def read_index(given: str | Path, *layouts: str) -> Index:
    """The index at a prefix, which must be of one of the `layouts` (megatron, fairseq, fairseq-legacy)."""
    prefix = clean_prefix(given)
    raw = Path(prefix + ".idx").read_bytes()
    if raw.startswith(LEGACY_MAGIC):
        index = _legacy(prefix, raw)
    elif raw.startswith(MAGIC):
        index = _mapped(prefix, raw)
    else:
        raise DataError(
            f"{prefix + '.idx'!r} is no index of Megatron or fairseq (it begins {raw[:9].hex(' ')})"
        )
    if index.layout not in layouts:
        raise DataError(
            f"{prefix + '.idx'!r} has the layout of {index.layout}, not of {' or '.join(layouts)}; "
            f"import it with --from {index.layout}"
        )
    ends = index.starts + index.lengths
    held = Path(prefix + ".bin").stat().st_size // np.dtype(index.dtype).itemsize
    if len(ends) and (index.lengths.min() < 0 or index.starts.min() < 0 or ends.max() > held):
        raise DataError(
            f"{prefix + '.bin'!r} holds {held} tokens, but its index points up to {int(ends.max())}: it is cut short, "
            "or the two files do not belong together; fetch both again"
        )
    return index


def _mapped(prefix: str, raw: bytes) -> Index:
    name = f"{prefix}.idx"
    if len(raw) < _COMMON.size:
        raise DataError(f"{name!r} is cut short ({len(raw)} bytes); fetch it again")
    _, version, code, n = _COMMON.unpack_from(raw)
    if version != 1:
        raise DataError(f"{name!r} has version {version}; version 1 is known")
    fits_fairseq = len(raw) == 26 + 12 * n
    d = struct.unpack_from("<Q", raw, 26)[0] if len(raw) >= 34 else 0
    fits_megatron = len(raw) in (34 + 12 * n + 8 * d, 34 + 13 * n + 8 * d)
    if fits_fairseq == fits_megatron:
        fits = (
            "both Megatron's and fairseq's layout"
            if fits_fairseq
            else "neither Megatron's nor fairseq's layout"
        )
        raise DataError(f"{name!r} ({len(raw)} bytes, {n} sequences) fits {fits}: it is cut short or damaged")
    dtypes = {**_DTYPES, **(_FAIRSEQ_ONLY if fits_fairseq else {})}
    if code not in dtypes:
        raise DataError(
            f"{name!r} holds values of type {code}, which are no token ids; allowed: {sorted(dtypes)}"
        )
    at = 26 if fits_fairseq else 34
    lengths = np.frombuffer(raw, "<i4", n, at).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", n, at + 4 * n)
    width = np.dtype(dtypes[code]).itemsize
    if (pointers % width).any():
        raise DataError(f"{name!r} has pointers that are no multiples of {width} bytes; it is damaged")
    documents = None
    if fits_megatron:
        documents = np.frombuffer(raw, "<i8", d, at + 12 * n).astype(np.int64)
        steps = np.diff(documents)
        if n and d < 2:
            raise DataError(
                f"{name!r} has {n} sequences and no documents: its writer never called end_document(), which ends "
                "each document; write it again with that call"
            )
        if not d or documents[0] != 0 or documents[-1] != n or (steps < 0).any():
            raise DataError(
                f"{name!r} has document bounds that do not cover its {n} sequences; it is damaged"
            )
    layout = "fairseq" if fits_fairseq else "megatron"
    return Index(prefix, layout, dtypes[code], lengths, pointers // width, documents, 0)


def _legacy(prefix: str, raw: bytes) -> Index:
    name = f"{prefix}.idx"
    if len(raw) < 48:
        raise DataError(f"{name!r} is cut short ({len(raw)} bytes); fetch it again")
    version, code, width, n, s = struct.unpack_from("<5Q", raw, 8)
    if version != 1 or len(raw) != 48 + 16 * (n + 1) + 8 * s:
        raise DataError(f"{name!r} (version {version}, {len(raw)} bytes, {n} items) is cut short or damaged")
    dtypes = {**_DTYPES, **_FAIRSEQ_ONLY}
    if code not in dtypes or np.dtype(dtypes[code]).itemsize != width:
        raise DataError(f"{name!r} holds values of type {code} and {width} bytes, which are no token ids")
    data_offsets = np.frombuffer(raw, "<i8", n + 1, 48 + 8 * (n + 1)).astype(np.int64)
    lengths = np.diff(data_offsets)
    return Index(prefix, "fairseq-legacy", dtypes[code], lengths, data_offsets[:-1], None, -1)
