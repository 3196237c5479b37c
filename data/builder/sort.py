"""The second phase of a build: the documents of a bucket in shuffled order."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minilm.data.builder.work import _HEADER, CONTINUES, NUM_BINS, Work, _bucket_path, _whole, _work
from minilm.data.format.pack import content_len, fill, joined, pieces

_INDEX_TOKENS = 1 << 22


def sort(folder: str, split: str, bucket: int, num_buckets: int) -> dict[str, Any]:
    """Gather bucket number `bucket` of a split from all runs, in key order; returns its counts."""
    work = _work(folder)
    low, high = (bucket << 64) // num_buckets, ((bucket + 1) << 64) // num_buckets
    parts = [
        _read_run(path, work, split, low, high) for path in sorted((Path(folder) / "runs").glob("*.run"))
    ]
    keys = np.concatenate([part[0] for part in parts])
    marked = np.concatenate([part[1] for part in parts])
    lengths = (marked & ~CONTINUES).astype(np.int64)
    tokens = np.concatenate([part[2] for part in parts])
    order = np.argsort(keys, kind="stable")
    tokens = _reorder(tokens, lengths, order)
    begins = np.flatnonzero(marked[order] < CONTINUES)  # pieces of a document are neighbours, in their order
    lengths = np.add.reduceat(lengths[order], begins) if len(begins) else lengths
    histogram = np.bincount(
        np.minimum((2 * np.log2(np.maximum(lengths, 1))).astype(int), NUM_BINS - 1), minlength=NUM_BINS
    )
    rows_of = pieces(lengths, work.layout.seq_len)
    num_rows = len(rows_of)
    if work.packing == "full":
        tokens = joined(tokens, lengths, work.sep)
    elif work.packing == "masked":
        order, counts = fill(rows_of, work.layout.seq_len)
        tokens = _reorder(tokens, rows_of.astype(np.int64), order)
        num_rows = len(counts)
        _whole(_bucket_path(folder, split, bucket, "pieces"), [rows_of[order].astype("<u4").tobytes()])
        _whole(_bucket_path(folder, split, bucket, "rows"), [counts.astype("<u4").tobytes()])
    else:
        _whole(_bucket_path(folder, split, bucket, "pieces"), [rows_of.astype("<u4").tobytes()])
    little = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    _whole(_bucket_path(folder, split, bucket, "tokens"), [little.tobytes()])
    return {
        "documents": len(lengths),
        "stream": len(tokens),
        "pieces": num_rows,  # rows of any packing but "full"
        "longer_than_row": int((lengths > content_len(work.layout.seq_len)).sum()),
        "histogram": histogram.tolist(),
    }


def _reorder(tokens: npt.NDArray, lengths: npt.NDArray, order: npt.NDArray) -> npt.NDArray:
    """Variable-length pieces of `tokens` in another order; a part at a time, because an index takes 8 bytes a token."""
    starts, new_lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
    new_starts = np.cumsum(new_lengths) - new_lengths
    out = np.empty_like(tokens)
    cuts = np.searchsorted(new_starts, np.arange(0, max(1, len(tokens)), _INDEX_TOKENS))
    for first, last in zip(cuts, [*cuts[1:], len(order)], strict=True):
        if first == last:
            continue
        begin, part = int(new_starts[first]), new_lengths[first:last]
        index = np.repeat(starts[first:last] - new_starts[first:last], part)
        index += np.arange(begin, begin + len(index))
        out[begin : begin + len(index)] = tokens[index]
    return out


def _read_run(path: Path, work: Work, split: str, low: int, high: int) -> tuple[Any, Any, Any]:
    with path.open("rb") as file:
        num_train, num_held, _, width = _HEADER.unpack(file.read(_HEADER.size))
        num = num_train + num_held
        keys = np.fromfile(file, "<u8", num)
        lengths = np.fromfile(file, "<u4", num)
        begin, end = (0, num_train) if split == "train" else (num_train, num)
        first = begin + int(np.searchsorted(keys[begin:end], np.uint64(low)))
        last = end if high >= 1 << 64 else begin + int(np.searchsorted(keys[begin:end], np.uint64(high)))
        plain = lengths & ~CONTINUES
        before = int(plain[:first].sum(dtype=np.int64))
        count = int(plain[first:last].sum(dtype=np.int64))
        file.seek(before * width, os.SEEK_CUR)
        dtype = np.dtype(work.layout.dtype)
        tokens = np.fromfile(file, dtype.newbyteorder("<"), count).astype(dtype, copy=False)
    return keys[first:last], lengths[first:last], tokens
