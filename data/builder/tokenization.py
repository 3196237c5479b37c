"""What a build's processes do: tokenize a unit, sort a bucket, write a shard. Plain functions of files.

    unit of text --tokenize--> runs: documents sorted by their shuffle key, with token ids
    all runs     --sort------> bucket: the documents whose keys lie in one range, in key order, back to back
    all buckets  --write-----> shard: a range of rows

Keys are hashes of (file, position in the file, seed), so the concatenated buckets are one shuffle of all
documents, the same however the text was cut into units or shared among processes. A document is held out when
the hash of its text falls below the share asked for: equal texts always land on the same side.
Every task writes under a temporary name and renames, so it may run twice. Imports stay light: no torch here.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer

from minilm.data.builder.work import _HEADER, Work, _run_path, _whole, _work
from minilm.data.sources.plugin import Document, find_source
from minilm.data.sources.progress import report

_BATCH_CHARACTERS = 1 << 19


_RUN_TOKENS = 1 << 24


@lru_cache(maxsize=1)
def _tokenizer(path: str, _changed: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
        on_held_out_side = is_held_out(document.content, work.held_out, work.seed)
        held.keys.append(_shuffle_key(document, work))
        held.held_out.append(on_held_out_side)
        held.ids.append(ids)
        counts["documents"] += 1
        counts["held_out"] += on_held_out_side
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


def is_held_out(content: str | npt.NDArray, held_out: float, seed: int) -> bool:
    """Whether a document belongs to the `held_out` share of all."""
    if not held_out:
        return False
    raw = (
        content.encode() if isinstance(content, str) else np.ascontiguousarray(content, dtype="<u4").tobytes()
    )
    return xxhash.xxh3_64_intdigest(raw, seed=seed) < int(held_out * 2**64)


def _shuffle_key(document: Document, work: Work) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<2Q", document.file, document.position), seed=work.seed)


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
