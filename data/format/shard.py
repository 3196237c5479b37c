"""One shard: a plain USTAR tar of blocks of rows, with deterministic bytes and addresses in closed form.

    block k   tar header | npy header, padded with spaces | tokens [rows, seq_len]
    {block:09d}.tokens.npy
              (unless packing is "full")   tar header | npy header | lengths [rows]
              {block:09d}.lengths.npy
              (packing "masked" instead)   tar header | npy header | ends, uint8 [rows, ceil(seq_len / 8)]:
              {block:09d}.ends.npy         bit t % 8 of byte t // 8 is set where a document's last token is token t
    end       two zero records of 512 bytes

Every block but the last of a data set has the same number of rows, and the npy header of tokens is padded so that the
tokens start at a multiple of 4096 bytes in the file. So block k's tokens start at 4096 + k * stride, and no reader
walks the tar (CPython's tarfile takes a damaged header for the end of the archive, cpython#120740). A block's checksum
covers all its bytes in the file, headers included. Any tar or webdataset reader can read a shard.
"""

import hashlib
import math
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from minilm.data.format.files import replacing

ALIGNMENT = 4096
_RECORD = 512
_MIN_NPY_HEADER = 128
TRAILER_BYTES = 2 * _RECORD


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Layout(NamedTuple):
    """The shape of blocks, from which all offsets follow. The last shard may have fewer than `blocks_per_shard`.

    has_lengths: an array stands beside the tokens: the rows' lengths or, where it has_ends, the ends of documents.
    """

    seq_len: int
    dtype: str
    rows_per_block: int
    blocks_per_shard: int
    has_lengths: bool
    has_ends: bool = False

    @property
    def row_bytes(self) -> int:
        return self.seq_len * np.dtype(self.dtype).itemsize

    @property
    def lengths_dtype(self) -> str:
        """Of the array beside the tokens."""
        if self.has_ends:
            return "uint8"
        return "uint16" if self.seq_len < 1 << 16 else "uint32"

    @property
    def lengths_shape(self) -> tuple[int, ...]:
        """Of one row in the array beside the tokens."""
        return (-(-self.seq_len // 8),) if self.has_ends else ()

    @property
    def length_bytes(self) -> int:
        """Of one row in the array beside the tokens."""
        return math.prod(self.lengths_shape) * np.dtype(self.lengths_dtype).itemsize

    @property
    def stride_bytes(self) -> int:
        """The distance from one block's tokens to the next block's."""
        end = self.end_of_block(0, self.rows_per_block)
        return _up(end + _RECORD + _MIN_NPY_HEADER, ALIGNMENT) - ALIGNMENT

    def tokens_at(self, block: int) -> int:
        """File offset of the tokens of the shard's `block` (0, 1, …)."""
        return ALIGNMENT + block * self.stride_bytes if block else ALIGNMENT  # stride_bytes asks for block 0

    def lengths_at(self, block: int, num_rows: int) -> int:
        """File offset of the block's lengths, or ends."""
        end_of_tokens = _up(self.tokens_at(block) + num_rows * self.row_bytes, _RECORD)
        return end_of_tokens + _RECORD + _MIN_NPY_HEADER

    def begin_of_block(self, block: int) -> int:
        """File offset of the block's first tar header."""
        return self.end_of_block(block - 1, self.rows_per_block) if block else 0

    def end_of_block(self, block: int, num_rows: int) -> int:
        """File offset just after the block: the next block's header, or the trailer."""
        if not self.has_lengths:
            return _up(self.tokens_at(block) + num_rows * self.row_bytes, _RECORD)
        return _up(self.lengths_at(block, num_rows) + num_rows * self.length_bytes, _RECORD)

    def shard_bytes(self, num_blocks: int, rows_of_last: int) -> int:
        """The size of a shard file with `num_blocks` blocks, the last of them with `rows_of_last` rows."""
        return self.end_of_block(num_blocks - 1, rows_of_last) + TRAILER_BYTES


def blocks_for(
    shard_bytes: int, seq_len: int, dtype: str, rows_per_block: int, has_lengths: bool, has_ends: bool = False
) -> int:
    """The number of blocks in a shard of about `shard_bytes`, at least one."""
    one = Layout(seq_len, dtype, rows_per_block, 1, has_lengths, has_ends)
    return max(1, shard_bytes // one.stride_bytes)


class WrittenShard(NamedTuple):
    num_bytes: int
    sha256: str
    block_checksums: list[int]


def write_shard(
    path: Path, layout: Layout, first_block: int, blocks: Iterable[tuple[npt.NDArray, npt.NDArray | None]]
) -> WrittenShard:
    """Write blocks of (tokens [rows, seq_len], lengths [rows] or bits of ends or None) as a shard; whole at `path`, or
    absent."""
    digest, checksums, at = hashlib.sha256(), [], 0
    with replacing(path) as file:
        for number, (tokens, lengths) in enumerate(blocks):
            pieces = _member(f"{first_block + number:09d}.tokens.npy", tokens, layout.tokens_at(number) - at)
            if lengths is not None:
                lengths = lengths.astype(layout.lengths_dtype)
                name = f"{first_block + number:09d}.{'ends' if layout.has_ends else 'lengths'}.npy"
                pieces += _member(name, lengths, _RECORD + _MIN_NPY_HEADER)
            checksum = xxhash.xxh3_64()
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                checksum.update(piece)
                at += len(piece)
            checksums.append(checksum.intdigest())
        file.write(bytes(TRAILER_BYTES))
        digest.update(bytes(TRAILER_BYTES))
    return WrittenShard(at + TRAILER_BYTES, digest.hexdigest(), checksums)


def record_tar(path: Path, records: Iterable[tuple[str, npt.NDArray]]) -> None:
    """Write (name, array) records as a plain USTAR tar of npy members, one record each."""
    with path.open("wb") as file:
        for name, array in records:
            for piece in _member(name, array, _RECORD + _MIN_NPY_HEADER):
                file.write(piece)
        file.write(bytes(TRAILER_BYTES))


def _member(name: str, array: npt.NDArray, payload_at: int) -> list[bytes]:
    """Tar header, npy header and payload of one member; the payload starts `payload_at` bytes after the member's
    begin."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    payload = np.ascontiguousarray(little).tobytes()
    npy_header = _npy_header(little, payload_at - _RECORD)
    info = tarfile.TarInfo(name)
    info.size = len(npy_header) + len(payload)
    info.mode = 0o644
    padding = bytes(_up(info.size, _RECORD) - info.size)
    return [info.tobuf(tarfile.USTAR_FORMAT), npy_header, payload, padding]


def _npy_header(array: npt.NDArray, num_bytes: int) -> bytes:
    """An npy 1.0 header (numpy.lib.format) of exactly `num_bytes`, filled up with spaces."""
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    head = b"\x93NUMPY\x01\x00" + (num_bytes - 10).to_bytes(2, "little")
    return head + text + b" " * (num_bytes - len(head) - len(text) - 1) + b"\n"
