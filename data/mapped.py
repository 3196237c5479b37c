"""One shard file mapped into memory: addresses in closed form, checksums on first use, rows gathered by
index.

Invariant: no byte leaves a block before the block's checksum has been compared. The file's size and its end
are checked when it is opened; nothing walks the tar.
"""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from data.errors import DataError
from data.manifest import HELD_OUT, MANIFEST, Manifest, block_checksums
from data.shard import TRAILER_BYTES


def damage(folder: Path, name: str, block: int, offset: int, what: str) -> DataError:
    """The error for a damaged shard: where, and the commands that list and mend the damage."""
    folder = Path(folder)
    whole = folder.parent if folder.name == HELD_OUT and (folder.parent / MANIFEST).exists() else folder
    return DataError(
        f"shard {str(folder / name)!r}, block {block}, at byte {offset}: {what}; list all damage with "
        f"`minilm data verify {whole}`, mend it with `minilm data repair {whole}`"
    )


class MappedShard:
    """Blocks of shard number `index`; `verified` (bool [blocks]) remembers which blocks were found whole.

    `path` is where the file lies when not in `folder` under its name (a cache).
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        index: int,
        verified: npt.NDArray[np.bool_],
        path: Path | None = None,
    ):
        self._folder, self._manifest = folder, manifest
        self.info, self.layout, self._verified = manifest.shard(index), manifest.layout, verified
        self._checksums: npt.NDArray[np.uint64] | None = None
        self._bytes = self._map(path or folder / self.info.name)
        self._whole, self._last = self._views()
        self._grid = self._one_grid()

    def _map(self, path: Path) -> memoryview:
        info, layout = self.info, self.layout
        try:
            with path.open("rb") as file:
                found = file.seek(0, 2)
                mapped = (
                    memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) if found else memoryview(b"")
                )
        except FileNotFoundError as error:
            raise damage(self._folder, info.name, info.first_block, 0, "the file is missing") from error
        if found != info.num_bytes:
            block = min(max(0, found - layout.tokens_at(0)) // layout.stride_bytes, info.num_blocks - 1)
            what = f"the file has {found} bytes instead of {info.num_bytes}"
            raise damage(self._folder, info.name, info.first_block + block, min(found, info.num_bytes), what)
        if any(mapped[-TRAILER_BYTES:]):
            at = info.num_bytes - TRAILER_BYTES
            last = info.first_block + info.num_blocks - 1
            raise damage(self._folder, info.name, last, at, "the end of the archive is not zero")
        return mapped

    def _views(self) -> tuple[npt.NDArray, npt.NDArray]:
        """Tokens as [whole blocks, rows_per_block, seq_len] and [rows of the last block, seq_len], nothing
        copied."""
        layout, info = self.layout, self.info
        last = info.num_blocks - 1
        rows_of_last = info.num_rows - last * layout.rows_per_block
        dtype = np.dtype(layout.dtype).newbyteorder("<")
        whole: npt.NDArray = np.ndarray(
            (last, layout.rows_per_block, layout.seq_len),
            dtype,
            buffer=self._bytes,
            offset=layout.tokens_at(0),
            strides=(layout.stride_bytes, layout.row_bytes, dtype.itemsize),
        )
        tail: npt.NDArray = np.ndarray(
            (rows_of_last, layout.seq_len), dtype, buffer=self._bytes, offset=layout.tokens_at(last)
        )
        return whole, tail

    def _one_grid(self) -> npt.NDArray | None:
        """All tokens as one [rows, seq_len] whose rows between blocks are junk; None where strides do not
        allow."""
        row_bytes, begin = self.layout.row_bytes, self.layout.tokens_at(0)
        if self.layout.stride_bytes % row_bytes:
            return None
        num_rows = (self.info.num_bytes - begin) // row_bytes
        dtype = np.dtype(self.layout.dtype).newbyteorder("<")
        return np.ndarray((num_rows, self.layout.seq_len), dtype, buffer=self._bytes, offset=begin)

    def verify(self, blocks: npt.NDArray[np.int64]) -> int:
        """Compare the checksums of these blocks of the shard unless that was done; how many were compared
        now.

        DataError names the first bad one.
        """
        pending = blocks[~self._verified[blocks]]
        if not pending.size:
            return 0
        if self._checksums is None:
            self._checksums = block_checksums(self._folder, self._manifest, self.info.number)
        pending = np.unique(pending)
        for block in pending:
            begin, end = self.span(int(block))
            if xxhash.xxh3_64_intdigest(self._bytes[begin:end]) != self._checksums[block]:
                what = f"its {end - begin} bytes do not have the checksum that the manifest pins"
                raise damage(self._folder, self.info.name, self.info.first_block + int(block), begin, what)
            self._verified[block] = True
        return len(pending)

    def span(self, block: int) -> tuple[int, int]:
        """Begin and end of a block of this shard in the file, headers included."""
        rows = self._manifest.rows_in_block(self.info.first_block + block)
        return self.layout.begin_of_block(block), self.layout.end_of_block(block, rows)

    def gather(
        self, blocks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], into: npt.NDArray
    ) -> npt.NDArray:
        """Copy row rows[i] of block blocks[i] to into[i] ([n, seq_len], contiguous), and return it.

        Where rows lie on one grid (row_bytes divides the stride: seq_len a power of two) this is one `take`.
        """
        if self._grid is not None:
            index = blocks * (self.layout.stride_bytes // self.layout.row_bytes) + rows
            return np.take(self._grid, index, axis=0, out=into, mode="clip")  # "raise" would copy twice
        is_last = blocks == self.info.num_blocks - 1
        into[is_last] = self._last[rows[is_last]]
        inner = ~is_last
        into[inner] = self._whole[blocks[inner], rows[inner]]
        return into

    def gather_lengths(
        self, blocks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Stored lengths of these rows, int64 [n]; only where packing is "document"."""
        lengths = np.empty(len(blocks), dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            lengths[here] = self.lengths(int(block))[rows[here]]
        return lengths

    def tokens(self, block: int) -> npt.NDArray:
        """The tokens of a block [rows, seq_len], mapped, not copied."""
        return self._last if block == self.info.num_blocks - 1 else self._whole[block]

    def lengths(self, block: int) -> npt.NDArray:
        """The stored lengths of a block's rows [rows]; only where packing is "document"."""
        rows = self._manifest.rows_in_block(self.info.first_block + block)
        dtype = np.dtype(self.layout.lengths_dtype).newbyteorder("<")
        return np.ndarray((rows,), dtype, buffer=self._bytes, offset=self.layout.lengths_at(block, rows))
