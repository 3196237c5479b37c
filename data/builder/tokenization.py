"""What a build's processes do: tokenize a unit, sort a bucket, write a shard. Plain functions of files.

    unit of text --tokenize--> runs: documents sorted by their shuffle key, with token ids
    all runs     --sort------> bucket: the documents whose keys lie in one range, in key order, back to back
    all buckets  --write-----> shard: a range of rows

Keys are hashes of (file, position in the file, seed), so the concatenated buckets are one shuffle of all
documents, the same however the text was cut into units or shared among processes. A long document is tokenized in
pieces of `_PIECE` characters, cut before white space where there is some; they share a key, lie in the same split, and
`sort` joins them again; the sentences of packing "sentence" stay apart. A document is held out when the hash of its
first 65,536 characters falls below the share asked for: equal texts always land on the same side.
Every task writes under a temporary name and renames, so it may run twice. Imports stay light: no torch here.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer

from minilm.data.builder.clean import NAMES, NAMES_TAKEN, Encoder, NotEncoded, clean
from minilm.data.builder.sentences import no_sentences, texts_of_rows
from minilm.data.builder.work import _HEADER, CONTINUES, Work, _run_path, _whole, _work
from minilm.data.errors import DataError
from minilm.data.sources.accounts import Accounts, LeftOut, Noticed
from minilm.data.sources.plugin import Document, Item, find_source
from minilm.data.sources.progress import report

_BATCH_CHARACTERS = 1 << 19
_PIECE = 1 << 18
_HASHED_CHARACTERS = 1 << 16  # no more than the shortest first piece that any reader gives


_RUN_TOKENS = 1 << 24


@lru_cache(maxsize=1)
def _encoder(path: str, special_tokens: str, _changed: int) -> Encoder:
    return Encoder(Tokenizer.from_file(path), special_tokens)


class _Held(NamedTuple):
    keys: list[int]
    held_out: list[bool]
    continues: list[bool]
    ids: list[npt.NDArray]


def tokenize(folder: str, unit: int) -> dict[str, Any]:
    """Turn unit number `unit` into runs; returns counts. Memory is bounded by one run.

    Text is tokenized; documents that come as token ids are taken as they are.
    """
    work = _work(folder)
    counts: dict[str, Any] = {"documents": 0, "tokens": 0, "unknown": 0, "held_out": 0, "runs": 0}
    accounts = Accounts()
    held, tokens_held = _Held([], [], [], []), 0
    key, held_out, has_ids = 0, False, False
    file: int | None = None  # of the document under way

    def close() -> None:
        if file is not None:
            accounts.of(file)["documents" if has_ids else "empty"] += 1
            counts["documents"] += has_ids
            counts["held_out"] += has_ids and held_out

    for document, rows in _coded(folder, work, unit, accounts):
        report({name: counts[name] for name in ("documents", "tokens")})
        if not document.continues:
            close()
            file, has_ids = document.file, False
            key = _shuffle_key(document, work)
            held_out = is_held_out(document.content, work.held_out, work.seed)
        for ids in rows:
            if not len(ids):
                continue
            held.keys.append(key)
            held.held_out.append(held_out)
            held.continues.append(has_ids and work.packing != "sentence")
            held.ids.append(ids)
            has_ids = True
            counts["tokens"] += len(ids)
            counts["unknown"] += int(np.count_nonzero(ids == work.unk)) if work.unk >= 0 else 0
            tokens_held += len(ids)
        if tokens_held >= _RUN_TOKENS:
            _write_run(_run_path(folder, unit, counts["runs"]), held)
            counts["runs"] += 1
            held, tokens_held = _Held([], [], [], []), 0
    close()
    if held.keys:
        _write_run(_run_path(folder, unit, counts["runs"]), held)
        counts["runs"] += 1
    return {**counts, "accounts": accounts.as_json()}


def _coded(
    folder: str, work: Work, unit: int, accounts: Accounts
) -> Iterator[tuple[Document, list[npt.NDArray]]]:
    """Every document of a unit, or piece of one, in order, with the token ids of its texts (one, or its sentences);
    the rest goes into `accounts`."""
    path = Path(folder) / "tokenizer" / "tokenizer.json"
    encoder = _encoder(str(path), work.special_tokens, path.stat().st_mtime_ns)
    told = NAMES if work.special_tokens == "text" else NAMES_TAKEN
    items = find_source(work.source).read(work.spec, work.units[unit])
    for batch in _batches(pieces(items, accounts)):
        texts = [document for document in batch if isinstance(document.content, str)]
        names = [encoder.names_in(str(document.content)) for document in texts]
        for document, number in zip(texts, names, strict=True):
            if number:
                accounts.add(Noticed(document.file, _place(document), told, number))
        coded = iter(_encoded(encoder, texts, work))
        for document in batch:
            if work.packing == "sentence" and not isinstance(document.content, str):
                raise no_sentences(work.source)
            rows = next(coded) if isinstance(document.content, str) else [document.content]
            yield document, [np.array(ids, dtype=work.layout.dtype) for ids in rows]


def _encoded(encoder: Encoder, texts: list[Document], work: Work) -> list[list[list[int]]]:
    split = [texts_of_rows(str(document.content), work.packing, work.language) for document in texts]
    try:
        coded = iter(encoder.encode([text for own in split for text in own]))
        return [[next(coded) for _ in own] for own in split]
    except NotEncoded:
        for document in texts:  # which one is it?
            try:
                encoder.encode([str(document.content)])
            except NotEncoded as error:
                name = work.names[document.file] if work.names and document.file < len(work.names) else ""
                raise DataError(f"text {name!r}, {_place(document)}: {error}; mend or remove it") from error
        raise


def _place(document: Document) -> str:
    return document.place or f"position {document.position}"


def pieces(items: Iterable[Item], accounts: Accounts) -> Iterator[Document]:
    """What a source reads as the tokenizer takes it; long texts in pieces."""
    for item in items:
        if isinstance(item, LeftOut | Noticed):
            accounts.add(item)
            continue
        if not isinstance(item.content, str):
            yield item
            continue
        text, seen = clean(item.content)
        for what, count in seen.items():
            accounts.add(Noticed(item.file, _place(item), what, count))
        at, continues = 0, item.continues
        while len(text) - at > _PIECE:
            end = _cut(text, at)
            yield item._replace(content=text[at:end], continues=continues)
            at, continues = end, True
        yield item._replace(content=text[at:] if at else text, continues=continues)


def _cut(text: str, at: int) -> int:
    """Where a piece that begins at `at` ends: before white space in its second half, else after `_PIECE` characters."""
    low, high = at + _PIECE // 2, at + _PIECE
    found = max(text.rfind("\n", low, high), text.rfind(" ", low, high))
    return found if found > 0 else high


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
    if isinstance(content, str):
        raw = content[:_HASHED_CHARACTERS].encode()
    else:
        raw = np.ascontiguousarray(content, dtype="<u4").tobytes()
    return xxhash.xxh3_64_intdigest(raw, seed=seed) < int(held_out * 2**64)


def _shuffle_key(document: Document, work: Work) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<2Q", document.file, document.position), seed=work.seed)


def _write_run(path: Path, held: _Held) -> None:
    """Counts of train and held-out documents and of tokens, then keys u64, lengths u32 (with CONTINUES for further
    pieces), tokens; both parts sorted, pieces of one document in their order."""
    keys = np.array(held.keys, dtype="<u8")
    held_out = np.array(held.held_out)
    order = np.lexsort((keys, held_out))
    lengths = np.array([len(ids) for ids in held.ids], dtype="<u4")
    lengths[np.array(held.continues)] |= CONTINUES
    tokens = np.concatenate([held.ids[i] for i in order])
    num_train = int((~held_out).sum())
    header = _HEADER.pack(num_train, len(keys) - num_train, len(tokens), tokens.dtype.itemsize)
    little = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    _whole(path, [header, keys[order].tobytes(), lengths[order].tobytes(), little.tobytes()])
