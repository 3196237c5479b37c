"""The shards of a data set as open files: a block's checksum is compared at its first use, rows are read one by one.

Invariant: no row is handed out before the checksum of its block was compared. A file's size and end are checked when
it is opened; nothing walks a tar. A read costs about a microsecond a row, and a training step consumes about a
thousand rows a second.
"""

import os
import resource
import weakref
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from minilm.data.errors import DamageError
from minilm.data.format.manifest import HELD_OUT, MANIFEST, Manifest, Shard, block_checksums
from minilm.data.format.shard import TRAILER_BYTES
from minilm.data.read.positioned import buffer_of, read_at
from minilm.data.read.rows import I64


class ShardFiles:
    """Rows of the data set in `folder`; `path_of` gives the file of a shard (in a cache, or in the folder itself).

    Nobody asks for rows of `masked` blocks (bool [blocks]), so a shard may be cut within them. At most `max_open` files
    are open at a time, by default an eighth of what the system allows the process. Not thread-safe.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        path_of: Callable[[Shard], Path],
        *,
        masked: npt.NDArray[np.bool_] | None = None,
        max_open: int | None = None,
    ):
        self._folder, self._manifest, self._path_of = folder, manifest, path_of
        # The system gives memory when a page of it is written: 10^10 rows cost nothing at the start.
        self._masked = np.zeros(manifest.num_blocks, dtype=bool) if masked is None else masked
        self._verified = np.zeros(manifest.num_blocks, dtype=bool)
        self._max_open = max_open or max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self._files: dict[int, int] = {}  # shard -> file descriptor, in the order of opening
        self._checksums: dict[int, npt.NDArray[np.uint64]] = {}
        self.num_checked = 0
        weakref.finalize(self, _close_all, self._files)

    def gather(self, rows: I64, into: npt.NDArray) -> npt.NDArray | None:
        """Read these rows into `into` ([n, seq_len], contiguous, little-endian stored dtype); returns what is stored
        beside them unless packing is "full": their lengths (int64 [n]), or the bits of their documents' ends (uint8
        [n, ceil(seq_len / 8)]). DamageError names the first damaged block."""
        layout = self._manifest.layout
        blocks, within = np.divmod(rows, layout.rows_per_block)
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            self.check(block)
        shards, inner = np.divmod(blocks, layout.blocks_per_shard)
        begin = inner * layout.stride_bytes
        self._read_items(shards, layout.tokens_at(0) + begin + within * layout.row_bytes, into)
        if not layout.has_lengths:
            return None
        dtype = np.dtype(layout.lengths_dtype).newbyteorder("<")
        lengths = np.empty((len(rows), *layout.lengths_shape), dtype)
        # Only the last block of all may have fewer rows, and so its lengths at another distance from its tokens.
        last = self._manifest.num_blocks - 1
        short = layout.lengths_at(0, self._manifest.rows_in_block(last))
        first_length = np.where(blocks == last, short, layout.lengths_at(0, layout.rows_per_block))
        self._read_items(shards, first_length + begin + within * layout.length_bytes, lengths)
        return lengths if layout.has_ends else lengths.astype(np.int64)

    def _read_items(self, shards: I64, offsets: I64, into: npt.NDArray) -> None:
        """Item i of `into` is read from shard `shards[i]` at byte `offsets[i]`."""
        out, size = buffer_of(into), into[:1].nbytes
        for number, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            self._read(shard, offset, out[number * size : (number + 1) * size])

    def _read(self, number: int, offset: int, into: memoryview) -> None:
        file = self._file(number)
        try:
            read_at(file, offset, into)
        except OSError as error:
            info = self._manifest.shard(number)
            self._verified[info.first_block : info.first_block + info.num_blocks] = False
            self.close(number)
            raise self._damage(number, offset, f"its bytes cannot be read ({error.strerror})") from error

    def check(self, block: int) -> None:
        """Compare the checksum of a block. DamageError says where it is damaged."""
        layout = self._manifest.layout
        number, inner = divmod(block, layout.blocks_per_shard)
        if number not in self._checksums:
            self._checksums[number] = block_checksums(self._folder, self._manifest, number)
        begin = layout.begin_of_block(inner)
        raw = bytearray(layout.end_of_block(inner, self._manifest.rows_in_block(block)) - begin)
        self._read(number, begin, memoryview(raw))
        if xxhash.xxh3_64_intdigest(raw) != self._checksums[number][inner]:
            what = f"its {len(raw)} bytes do not have the checksum that the manifest pins"
            raise self._damage(number, begin, what)
        self._verified[block] = True
        self.num_checked += 1

    def check_end(self, number: int) -> None:
        """Compare size and end of a shard's file with what they should be. DamageError if they differ."""
        if (found := self._wrong_end(self._manifest.shard(number))) is not None:
            raise self._damage(number, *found)

    def _wrong_end(self, info: Shard) -> tuple[int, str] | None:
        """The first wrong byte at the end of a shard's file and what is wrong with it."""
        file, offset = self._file(info.number), info.num_bytes - TRAILER_BYTES
        size = os.fstat(file).st_size
        if size != info.num_bytes:
            return min(size, info.num_bytes), f"the file has {size} bytes instead of {info.num_bytes}"
        trailer = bytearray(TRAILER_BYTES)
        try:
            read_at(file, offset, memoryview(trailer))
        except OSError as error:
            return offset, f"its bytes cannot be read ({error.strerror})"
        return (offset, "the end of the archive is not zero") if any(trailer) else None

    def drop_page_cache(self, number: int) -> None:
        """Ask the system to read this shard from the disk again, as far as no other process has it mapped."""
        os.posix_fadvise(self._file(number), 0, 0, os.POSIX_FADV_DONTNEED)

    def _file(self, number: int) -> int:
        if number not in self._files:
            self._open(number)
        return self._files[number]

    def _open(self, number: int) -> None:
        info = self._manifest.shard(number)
        while len(self._files) >= self._max_open:
            self.close(next(iter(self._files)))
        try:
            self._files[number] = os.open(self._path_of(info), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise self._damage(number, 0, "the file is missing") from error
        if (found := self._wrong_end(info)) is not None:
            end = info.first_block + info.num_blocks
            if not self._masked[self._block_at(found[0], info) : end].all():
                self.close(number)
                raise self._damage(number, *found)

    def close(self, number: int) -> None:
        """Close the file of a shard; it is opened again when it is needed. What was verified stays verified."""
        if number in self._files:
            os.close(self._files.pop(number))

    def close_all(self) -> None:
        """Close the files of all shards."""
        _close_all(self._files)

    def _block_at(self, offset: int, info: Shard) -> int:
        """The block that holds this byte of a shard's file; the last one for its end."""
        inner = bisect_right(range(info.num_blocks), offset, key=self._manifest.layout.begin_of_block) - 1
        return info.first_block + inner

    def _damage(self, number: int, offset: int, what: str) -> DamageError:
        """The error for a damaged shard: where, and the commands that list and repair the damage."""
        folder, info = self._folder, self._manifest.shard(number)
        whole = folder.parent if folder.name == HELD_OUT and (folder.parent / MANIFEST).exists() else folder
        return DamageError(
            f"shard {str(folder / info.name)!r}, block {self._block_at(offset, info)}, at byte {offset}: {what}; list "
            f"all damage with `minilm data verify {whole}`, repair it with `minilm data repair {whole}`",
            number,
        )


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def damaged_blocks(path: Path, folder: Path, manifest: Manifest, shard: Shard) -> list[int]:
    """The blocks of a shard's file that differ from what the manifest pins, read from the disk as far as the system
    allows. A wrong end of the file counts as its last block. DataError if the checksums themselves are damaged."""
    every = np.ones(manifest.num_blocks, dtype=bool)  # a file with a wrong end is opened all the same
    files = ShardFiles(folder, manifest, lambda _: path, masked=every)
    blocks = range(shard.first_block, shard.first_block + shard.num_blocks)
    bad = []
    try:
        files.drop_page_cache(shard.number)
    except DamageError:
        return list(blocks)  # the file is missing
    for block in blocks:
        try:
            files.check(block)
            if block == blocks[-1]:
                files.check_end(shard.number)
        except DamageError:
            bad.append(block)
    files.close_all()
    return bad
