"""The third phase of a build: sorted documents into shards."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minilm.data.builder.work import Work, _bucket_path, _work
from minilm.data.format.manifest import shard_name
from minilm.data.format.pack import NUM_WRAPPERS, content_len, document_rows, full_rows, masked_rows
from minilm.data.format.shard import write_shard


def write(
    folder: str, split: str, shard: int, num_rows: int, streams: list[int], bucket_rows: list[int]
) -> Any:
    """Write shard number `shard` of a split of `num_rows` rows; buckets hold `streams` tokens and
    `bucket_rows` rows."""
    work = _work(folder)
    layout = work.layout
    rows_per_shard = layout.blocks_per_shard * layout.rows_per_block
    first, last = shard * rows_per_shard, min((shard + 1) * rows_per_shard, num_rows)
    num_real = 0

    def blocks() -> Iterator[tuple[npt.NDArray, npt.NDArray | None]]:
        nonlocal num_real
        for begin in range(first, last, layout.rows_per_block):
            end = min(begin + layout.rows_per_block, last)
            if work.packing == "full":
                content = content_len(layout.seq_len)
                stream = _span(folder, split, streams, begin * content, end * content, work)
                rows, lengths = full_rows(stream, layout.seq_len, work.cls, work.sep), None
                num_real += rows.size
            else:
                rows, lengths, num_tokens = _document_block(folder, split, bucket_rows, begin, end, work)
                num_real += num_tokens
            yield rows, lengths

    target = Path(folder) / split / shard_name(shard)
    written = write_shard(target, layout, shard * layout.blocks_per_shard, blocks())
    return {"tokens": num_real, **written._asdict()}


def _overlaps(sizes: list[int], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(bucket, from, to) of the parts of [begin, end) in buckets of these sizes laid end to end."""
    at = 0
    for bucket, size in enumerate(sizes):
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            yield bucket, low - at, high - at
        at += size


def _span(folder: str, split: str, sizes: list[int], begin: int, end: int, work: Work) -> npt.NDArray:
    dtype = np.dtype(work.layout.dtype)
    parts = [
        np.fromfile(
            _bucket_path(folder, split, bucket, "tokens"),
            dtype.newbyteorder("<"),
            count=high - low,
            offset=low * dtype.itemsize,
        ).astype(dtype, copy=False)
        for bucket, low, high in _overlaps(sizes, begin, end)
    ]
    return np.concatenate(parts)


def _counts(path: Path) -> tuple[npt.NDArray, npt.NDArray]:
    """The whole numbers of a file that another task has left, and how many come before each of them in sum."""
    return _counts_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _counts_of(path: Path, _changed: int) -> tuple[npt.NDArray, npt.NDArray]:
    counts = np.fromfile(path, "<u4").astype(np.int64)
    return counts, np.concatenate([[0], np.cumsum(counts)])


def _document_block(
    folder: str, split: str, bucket_rows: list[int], begin: int, end: int, work: Work
) -> tuple[npt.NDArray, npt.NDArray, int]:
    """Rows [begin, end), their lengths or the bits of their documents' ends, and how many tokens they hold."""
    dtype, masked = np.dtype(work.layout.dtype), work.packing == "masked"
    tokens, lengths, held = [], [], []
    for bucket, low, high in _overlaps(bucket_rows, begin, end):
        if masked:
            counts, firsts = _counts(_bucket_path(folder, split, bucket, "rows"))
            held.append(counts[low:high])
            low, high = int(firsts[low]), int(firsts[high])  # from here on pieces
        all_lengths, starts = _counts(_bucket_path(folder, split, bucket, "pieces"))
        path = _bucket_path(folder, split, bucket, "tokens")
        count, offset = int(starts[high] - starts[low]), int(starts[low]) * dtype.itemsize
        tokens.append(np.fromfile(path, dtype.newbyteorder("<"), count=count, offset=offset))
        lengths.append(all_lengths[low:high])
    flat, of_pieces = np.concatenate(tokens).astype(dtype, copy=False), np.concatenate(lengths)
    special = work.layout.seq_len, work.cls, work.sep, work.pad
    if masked:
        rows, ends = masked_rows(flat, of_pieces, np.concatenate(held), *special)
        beside = np.packbits(ends, axis=1, bitorder="little")
    else:
        rows, beside = document_rows(flat, of_pieces, *special)
    return rows, beside, len(flat) + NUM_WRAPPERS * len(of_pieces)
