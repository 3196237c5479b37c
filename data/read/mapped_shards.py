"""All shards of a data set mapped side by side: checksums on first use, rows gathered by index.

Invariant: no row is handed out before the checksum of its block was compared, and none of a shard that is not
mapped: `_junk` knows both, block by block. A file's size and end are checked when it is mapped; nothing walks a tar.
Numpy's calls cost as much as the copies of some dozens of rows, so `gather` makes few of them.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from minilm.data.errors import DamageError, DataError
from minilm.data.format.manifest import HELD_OUT, MANIFEST, Manifest, Shard, block_checksums
from minilm.data.format.shard import ALIGNMENT, TRAILER_BYTES
from minilm.data.read.address_space import AddressSpace

I64 = npt.NDArray[np.int64]

_MAX_MAPPED_SHARDS = 20_000  # two areas each; the kernel allows a process 65,530


def damage(folder: Path, shard: Shard, block: int, offset: int, what: str) -> DamageError:
    """The error for a damaged shard: where, and the commands that list and mend the damage."""
    folder = Path(folder)
    whole = folder.parent if folder.name == HELD_OUT and (folder.parent / MANIFEST).exists() else folder
    return DamageError(
        f"shard {str(folder / shard.name)!r}, block {block}, at byte {offset}: {what}; list all damage with "
        f"`minilm data verify {whole}`, mend it with `minilm data repair {whole}`",
        shard.number,
    )


class MappedShards:
    """Rows of the data set in `folder`. `locate` says where a shard's file lies (a cache, or the folder itself).

    Nobody asks for rows of `masked` blocks (bool [blocks]), so a shard may be cut within them.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        locate: Callable[[Shard], Path],
        *,
        verify: bool = True,
        masked: npt.NDArray[np.bool_] | None = None,
    ):
        self._folder, self._manifest, self._locate, self._verify = folder, manifest, locate, verify
        self._masked = np.zeros(manifest.num_blocks, dtype=bool) if masked is None else masked
        self.layout = layout = manifest.layout
        whole = layout.shard_bytes(manifest.blocks_per_shard, manifest.rows_per_block)
        page = max(ALIGNMENT, mmap.PAGESIZE)
        self._slot = -(-whole // page) * page
        num_bytes = manifest.num_shards * self._slot
        try:
            self._space = AddressSpace(num_bytes)
        except OSError as error:
            raise DataError(
                f"{num_bytes >> 30} GiB of addresses for {str(folder)!r} are refused ({error.strerror}); "
                "raise the limit on virtual memory (ulimit -v unlimited)"
            ) from error
        self._mapped: OrderedDict[int, None] = OrderedDict()
        self._checksums: dict[int, npt.NDArray[np.uint64]] = {}
        # 0 for a block that is not ready, else 1 + the rows of the grid that are no rows of ours before it. Memory is
        # taken page by page as it is written: 10^10 rows cost nothing at the start.
        self._junk = np.zeros(manifest.num_blocks, dtype=np.int64)
        self._verified = np.zeros(manifest.num_blocks, dtype=bool)
        self.num_checked = 0
        self._rows = self._row_view()
        self._grid = self._grid_view()

    def _row_view(self) -> npt.NDArray:
        """All tokens as [shards, blocks, rows, seq_len], nothing copied."""
        layout, dtype = self.layout, np.dtype(self.layout.dtype).newbyteorder("<")
        shape = (self._manifest.num_shards, layout.blocks_per_shard, layout.rows_per_block, layout.seq_len)
        strides = (self._slot, layout.stride_bytes, layout.row_bytes, dtype.itemsize)
        return np.ndarray(shape, dtype, buffer=self._space.bytes, offset=layout.tokens_at(0), strides=strides)

    def _grid_view(self) -> npt.NDArray | None:
        """All tokens as one [rows, seq_len] with junk between blocks; None where a row's bytes do not divide the
        distance of blocks (seq_len not a power of two)."""
        layout, begin = self.layout, self.layout.tokens_at(0)
        if layout.stride_bytes % layout.row_bytes or self._slot % layout.row_bytes:
            return None
        num_rows = (len(self._space.bytes) - begin) // layout.row_bytes
        dtype = np.dtype(layout.dtype).newbyteorder("<")
        return np.ndarray((num_rows, layout.seq_len), dtype, buffer=self._space.bytes, offset=begin)

    def ready(self, blocks: I64) -> npt.NDArray[np.bool_]:
        """bool [n]: which of these blocks are mapped and have been compared."""
        return self._junk.take(blocks) != 0

    def gather(self, wanted: I64, into: npt.NDArray) -> I64 | None:
        """Copy rows `wanted` to `into` ([n, seq_len], contiguous, stored dtype); their stored lengths (int64
        [n]) where packing is "document". DataError names the first damaged block."""
        layout = self.layout
        # unsigned division by a scalar is several times as fast
        blocks = (wanted.view(np.uint64) // np.uint64(layout.rows_per_block)).view(np.int64)
        index = self._junk.take(blocks)
        if not np.logical_and.reduce(index):
            self._prepare(np.unique(blocks[index == 0]), keep=blocks)
            index = self._junk.take(blocks)
        if self._grid is not None:
            index += wanted
            index -= 1
            np.take(self._grid, index, axis=0, out=into, mode="clip")  # mode "raise" would copy twice
        else:
            shards, inner = np.divmod(blocks, layout.blocks_per_shard)
            into[...] = self._rows[shards, inner, wanted - blocks * layout.rows_per_block]
        lengths = None
        if layout.has_lengths:
            lengths = self._lengths(blocks, wanted - blocks * layout.rows_per_block)
        if self._space.lost:
            raise self._cut()
        return lengths

    def _cut(self) -> DamageError:
        """The error for bytes that went away after they were mapped. What was known of that shard is forgotten."""
        number, offset = divmod(self._space.lost[0], self._slot)
        self._space.lost.clear()
        self.forget(number)
        info = self._manifest.shard(number)
        self._verified[info.first_block : info.first_block + info.num_blocks] = False
        inside = max(0, offset - self.layout.tokens_at(0)) // self.layout.stride_bytes
        block = info.first_block + min(inside, info.num_blocks - 1)
        what = "its bytes went away while they were read (the file was cut, or the disk fails)"
        return damage(self._folder, info, block, offset, what)

    def _junk_before(self, blocks: I64) -> I64:
        """Rows of the grid, before each of these blocks, that are not rows of ours: the ends of blocks and shards."""
        layout = self.layout
        if self._grid is None:
            return np.zeros(len(blocks), dtype=np.int64)
        junk = layout.stride_bytes // layout.row_bytes - layout.rows_per_block
        rows_a_shard = layout.rows_per_block * layout.blocks_per_shard
        shard_junk = self._slot // layout.row_bytes - rows_a_shard - junk * layout.blocks_per_shard
        return blocks * junk + blocks // layout.blocks_per_shard * shard_junk

    def _lengths(self, blocks: I64, rows: I64) -> I64:
        """int64 [n]: stored lengths of rows `rows` of `blocks`. Only the last block of all may have fewer rows, and so
        its lengths at another distance from its tokens."""
        layout, last = self.layout, self._manifest.num_blocks - 1
        shards, inner = np.divmod(blocks, layout.blocks_per_shard)
        short = layout.lengths_at(0, self._manifest.rows_in_block(last))
        behind = np.where(blocks == last, short, layout.lengths_at(0, layout.rows_per_block))
        dtype = np.dtype(layout.lengths_dtype).newbyteorder("<")
        at = shards * self._slot + inner * layout.stride_bytes + behind + rows * dtype.itemsize
        return self._space.bytes.view(dtype)[at // dtype.itemsize].astype(np.int64)

    def _prepare(self, blocks: I64, keep: I64) -> None:
        """Map and verify these blocks; shards of the blocks in `keep` stay mapped."""
        per_shard = self.layout.blocks_per_shard
        shards = np.unique(blocks // per_shard)
        self._make_room(len(shards), set((keep // per_shard).tolist()))
        for shard in shards.tolist():
            if shard not in self._mapped:
                self._map(shard)
            mine = blocks[blocks // per_shard == shard]
            if self._verify:
                for block in mine[~self._verified[mine]].tolist():
                    self.check(block)
            self._junk[mine] = self._junk_before(mine) + 1

    def _make_room(self, count: int, keep: set[int]) -> None:
        oldest = [shard for shard in self._mapped if shard not in keep] if self._full(count) else []
        for shard in oldest:
            if not self._full(count):
                return
            self.forget(shard)

    def _full(self, count: int) -> bool:
        return len(self._mapped) + count > _MAX_MAPPED_SHARDS

    def _map(self, number: int) -> None:
        info, layout = self._manifest.shard(number), self.layout
        try:
            with self._locate(info).open("rb") as file:
                found = file.seek(0, 2)
                last = info.first_block + info.num_blocks - 1
                if found != info.num_bytes:
                    inside = max(0, found - layout.tokens_at(0)) // layout.stride_bytes
                    block = min(info.first_block + inside, last)
                    if not self._masked[block : last + 1].all():
                        what = f"the file has {found} bytes instead of {info.num_bytes}"
                        raise damage(self._folder, info, block, min(found, info.num_bytes), what)
                self._space.map(file.fileno(), number * self._slot, info.num_bytes)
        except FileNotFoundError as error:
            raise damage(self._folder, info, info.first_block, 0, "the file is missing") from error
        self._mapped[number] = None
        end = number * self._slot + info.num_bytes
        if self._verify and not self._masked[last] and self._space.bytes[end - TRAILER_BYTES : end].any():
            self.forget(number)
            what = "the end of the archive is not zero"
            raise damage(self._folder, info, last, info.num_bytes - TRAILER_BYTES, what)

    def forget(self, number: int) -> None:
        """Unmap a shard; it is mapped again when it is needed. What was verified stays verified."""
        if number in self._mapped:
            info = self._manifest.shard(number)
            self._junk[info.first_block : info.first_block + info.num_blocks] = 0
            del self._mapped[number]
            self._space.unmap(number * self._slot, self._slot)

    def forget_all(self) -> None:
        """Unmap all shards."""
        for number in list(self._mapped):
            self.forget(number)

    def check(self, block: int) -> None:
        """Compare the checksum of a block whose shard is mapped. DataError says where it is damaged."""
        number, inner = divmod(block, self.layout.blocks_per_shard)
        if number not in self._mapped:
            self._map(number)
        if number not in self._checksums:
            self._checksums[number] = block_checksums(self._folder, self._manifest, number)
        begin = self.layout.begin_of_block(inner)
        end = self.layout.end_of_block(inner, self._manifest.rows_in_block(block))
        at = number * self._slot
        found = xxhash.xxh3_64_intdigest(self._space.bytes[at + begin : at + end].data)
        if self._space.lost:
            raise self._cut()
        if found != self._checksums[number][inner]:
            what = f"its {end - begin} bytes do not have the checksum that the manifest pins"
            raise damage(self._folder, self._manifest.shard(number), block, begin, what)
        self._verified[block] = True
        self.num_checked += 1
