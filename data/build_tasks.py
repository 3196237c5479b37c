"""What a build's processes do: tokenize a unit, sort a bucket, write a shard. Plain functions of files.

    unit of text --tokenize--> runs: documents sorted by their shuffle key, with token ids
    all runs     --sort------> bucket: the documents whose keys lie in one range, in key order, back to back
    all buckets  --write-----> shard: a range of rows

Keys are hashes of (file, position in the file, seed), so the concatenated buckets are one shuffle of all
documents, the same however the text was cut into units or shared among processes. A document is held out when
the hash of its text falls below the share asked for: equal texts always land on the same side.
Every task writes under a temporary name and renames, so it may run twice. Imports stay light: no torch here.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer

from data.manifest import shard_name
from data.pack import content_len, document_rows, full_rows, joined, pieces
from data.shard import Layout, write_shard
from data.sources.plugin import Document, find_source
from data.telling import report

SPLITS = ("train", "held-out")
NUM_BINS = 40  # of the length histogram: bin i holds lengths in [2^(i/2), 2^((i+1)/2))
_BATCH_CHARACTERS = 1 << 19
_RUN_TOKENS = 1 << 24
_HEADER = struct.Struct("<4Q")


class Work(NamedTuple):
    """What every task needs to know; written once as plan.json in the build's folder."""

    source: str
    spec: Any
    units: list[Any]
    seed: int
    held_out: float
    packing: str
    layout: Layout
    cls: int
    sep: int
    pad: int
    unk: int


def save_work(folder: Path, work: Work) -> None:
    save_json(folder / "plan.json", work._asdict())


@lru_cache(maxsize=1)
def load_work(folder: str, _changed: int) -> Work:
    fields = json.loads((Path(folder) / "plan.json").read_text())
    fields["layout"] = Layout(*fields["layout"])
    return Work(**fields)


def _work(folder: str) -> Work:
    return load_work(folder, (Path(folder) / "plan.json").stat().st_mtime_ns)


def save_json(path: Path, value: Any) -> None:
    _whole(path, [json.dumps(value).encode()])


def _whole(path: Path, parts: list[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _tokenizer(path: str, _changed: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# ---------------------------------------------------------------- tokenize


class _Held(NamedTuple):
    keys: list[int]
    held_out: list[bool]
    ids: list[npt.NDArray]


def tokenize(folder: str, unit: int) -> dict[str, Any]:
    """Turn unit number `unit` into runs; returns counts. Memory is bounded by one run.

    Text is tokenized; documents that come as token ids are taken as they are.
    """
    work = _work(folder)
    counts = {"documents": 0, "empty": 0, "tokens": 0, "unknown": 0, "held_out": 0, "runs": 0}
    held, tokens_held = _Held([], [], []), 0
    for document, ids in _coded(folder, work, unit):
        report({name: counts[name] for name in ("documents", "tokens")})
        if not len(ids):
            counts["empty"] += 1
            continue
        is_held_out = _is_held_out(document.content, work)
        held.keys.append(_shuffle_key(document, work))
        held.held_out.append(is_held_out)
        held.ids.append(ids)
        counts["documents"] += 1
        counts["held_out"] += is_held_out
        counts["tokens"] += len(ids)
        counts["unknown"] += int(np.count_nonzero(ids == work.unk)) if work.unk >= 0 else 0
        tokens_held += len(ids)
        if tokens_held >= _RUN_TOKENS:
            _write_run(_run_path(folder, unit, counts["runs"]), held)
            counts["runs"] += 1
            held, tokens_held = _Held([], [], []), 0
    if held.keys:
        _write_run(_run_path(folder, unit, counts["runs"]), held)
        counts["runs"] += 1
    return counts


def _coded(folder: str, work: Work, unit: int) -> Iterator[tuple[Document, npt.NDArray]]:
    """Every document of a unit with its token ids, in order."""
    path = Path(folder) / "tokenizer" / "tokenizer.json"
    tokenizer = _tokenizer(str(path), path.stat().st_mtime_ns)
    for batch in _batches(find_source(work.source).read(work.spec, work.units[unit])):
        texts = [document.content for document in batch if isinstance(document.content, str)]
        coded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for document in batch:
            ids = next(coded).ids if isinstance(document.content, str) else document.content
            yield document, np.array(ids, dtype=work.layout.dtype)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_held_out(content: str | npt.NDArray, work: Work) -> bool:
    if not work.held_out:
        return False
    raw = (
        content.encode() if isinstance(content, str) else np.ascontiguousarray(content, dtype="<u4").tobytes()
    )
    return xxhash.xxh3_64_intdigest(raw, seed=work.seed) < int(work.held_out * 2**64)


def _shuffle_key(document: Document, work: Work) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<2Q", document.file, document.position), seed=work.seed)


def _run_path(folder: str, unit: int, run: int) -> Path:
    return Path(folder) / "runs" / f"{unit:06d}-{run:04d}.run"


def _write_run(path: Path, held: _Held) -> None:
    """Counts of train and held-out documents and of tokens, then keys u64, lengths u32, tokens; both parts
    sorted."""
    keys = np.array(held.keys, dtype="<u8")
    held_out = np.array(held.held_out)
    order = np.lexsort((keys, held_out))
    lengths = np.array([len(ids) for ids in held.ids], dtype="<u4")
    tokens = np.concatenate([held.ids[i] for i in order])
    num_train = int((~held_out).sum())
    header = _HEADER.pack(num_train, len(keys) - num_train, len(tokens), tokens.dtype.itemsize)
    little = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    _whole(path, [header, keys[order].tobytes(), lengths[order].tobytes(), little.tobytes()])


# ---------------------------------------------------------------- sort


def sort(folder: str, split: str, bucket: int, num_buckets: int) -> dict[str, Any]:
    """Gather bucket number `bucket` of a split from all runs, in key order; returns its counts."""
    work = _work(folder)
    low, high = (bucket << 64) // num_buckets, ((bucket + 1) << 64) // num_buckets
    parts = [
        _read_run(path, work, split, low, high) for path in sorted((Path(folder) / "runs").glob("*.run"))
    ]
    keys = np.concatenate([part[0] for part in parts])
    lengths = np.concatenate([part[1] for part in parts]).astype(np.int64)
    tokens = np.concatenate([part[2] for part in parts])
    order = np.argsort(keys, kind="stable")
    tokens = _reorder(tokens, lengths, order)
    lengths = lengths[order]
    histogram = np.bincount(
        np.minimum((2 * np.log2(np.maximum(lengths, 1))).astype(int), NUM_BINS - 1), minlength=NUM_BINS
    )
    rows_of = pieces(lengths, work.layout.seq_len)
    if work.packing == "full":
        tokens = joined(tokens, lengths, work.sep)
    else:
        _whole(_bucket_path(folder, split, bucket, "pieces"), [rows_of.astype("<u4").tobytes()])
    little = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    _whole(_bucket_path(folder, split, bucket, "tokens"), [little.tobytes()])
    return {
        "documents": len(lengths),
        "stream": len(tokens),
        "pieces": len(rows_of),
        "longer_than_row": int((lengths > content_len(work.layout.seq_len)).sum()),
        "histogram": histogram.tolist(),
    }


def _reorder(tokens: npt.NDArray, lengths: npt.NDArray, order: npt.NDArray) -> npt.NDArray:
    """Variable-length pieces of `tokens` in another order."""
    starts = np.cumsum(lengths) - lengths
    new_starts = np.cumsum(lengths[order]) - lengths[order]
    index = np.repeat(starts[order] - new_starts, lengths[order]) + np.arange(len(tokens))
    return tokens[index]


def _read_run(path: Path, work: Work, split: str, low: int, high: int) -> tuple[Any, Any, Any]:
    with path.open("rb") as file:
        num_train, num_held, _, width = _HEADER.unpack(file.read(_HEADER.size))
        num = num_train + num_held
        keys = np.fromfile(file, "<u8", num)
        lengths = np.fromfile(file, "<u4", num)
        begin, end = (0, num_train) if split == "train" else (num_train, num)
        first = begin + int(np.searchsorted(keys[begin:end], np.uint64(low)))
        last = end if high >= 1 << 64 else begin + int(np.searchsorted(keys[begin:end], np.uint64(high)))
        before = int(lengths[:first].sum(dtype=np.int64))
        count = int(lengths[first:last].sum(dtype=np.int64))
        file.seek(before * width, os.SEEK_CUR)
        dtype = np.dtype(work.layout.dtype)
        tokens = np.fromfile(file, dtype.newbyteorder("<"), count).astype(dtype, copy=False)
    return keys[first:last], lengths[first:last], tokens


def _bucket_path(folder: str, split: str, bucket: int, what: str) -> Path:
    return Path(folder) / "buckets" / f"{split}-{bucket:05d}.{what}"


# ---------------------------------------------------------------- write


def write(
    folder: str, split: str, shard: int, num_rows: int, streams: list[int], num_pieces: list[int]
) -> Any:
    """Write shard number `shard` of a split of `num_rows` rows; buckets hold `streams` tokens and
    `num_pieces` rows."""
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
                rows, lengths = _document_block(folder, split, num_pieces, begin, end, work)
                num_real += int(lengths.sum())
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


@lru_cache(maxsize=2)
def _pieces_of(path: Path, _changed: int) -> tuple[npt.NDArray, npt.NDArray]:
    lengths = np.fromfile(path, "<u4").astype(np.int64)
    return lengths, np.concatenate([[0], np.cumsum(lengths)])


def _document_block(
    folder: str, split: str, num_pieces: list[int], begin: int, end: int, work: Work
) -> tuple[npt.NDArray, npt.NDArray]:
    dtype = np.dtype(work.layout.dtype)
    tokens, lengths = [], []
    for bucket, low, high in _overlaps(num_pieces, begin, end):
        lengths_path = _bucket_path(folder, split, bucket, "pieces")
        all_lengths, starts = _pieces_of(lengths_path, lengths_path.stat().st_mtime_ns)
        path = _bucket_path(folder, split, bucket, "tokens")
        count, offset = int(starts[high] - starts[low]), int(starts[low]) * dtype.itemsize
        tokens.append(np.fromfile(path, dtype.newbyteorder("<"), count=count, offset=offset))
        lengths.append(all_lengths[low:high])
    flat = np.concatenate(tokens).astype(dtype, copy=False)
    return document_rows(flat, np.concatenate(lengths), work.layout.seq_len, work.cls, work.sep, work.pad)


TASKS: dict[str, Callable[..., Any]] = {"tokenize": tokenize, "sort": sort, "write": write}
