"""From a `DataSpec` to rows: worker, ledger and publishing open a stage's data here and nowhere else.

A corpus is a folder, a URL (read through the node's cache), or a `.bin`/`.idx` pair that is read in place. The held-out
rows of a corpus are its `held-out/` split, or the end of a pair. Data that do not have the fingerprint pinned in the
spec are an error, so a data set cannot be replaced in the middle of a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minilm.data.errors import DataError
from minilm.data.format.manifest import HELD_OUT, MANIFEST, TOKENIZER, check_files, sha256_of
from minilm.data.format.pack import PACKINGS
from minilm.data.read.cached_reader import CachedReader
from minilm.data.read.indexed_dataset import IndexedRows
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.read.row_range import RowRange
from minilm.data.read.rows import Corpus, Rows
from minilm.data.storage.remote import is_remote
from minilm.data.stream import Stream
from minilm.data.tools.verify import check_tokenizer
from minilm.model.files import tokenizer_files
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec, DataSpec


class HeldOut(NamedTuple):
    """The rows of one corpus that no step reads, and the corpus's weight in the mixture."""

    name: str
    weight: float
    rows: Rows


def load_quarantine(data: DataSpec) -> Quarantine | None:
    """The current list of damaged blocks to leave out; None if damage ends the run."""
    if data.quarantine is None:
        return None
    return Quarantine(Path(data.quarantine.path), max_quarantined_share=data.quarantine.max_share)


def open_stream(
    data: DataSpec,
    *,
    seed: int,
    batch: int,
    micro_batch: int,
    pin: bool = False,
    quarantine: Quarantine | None = None,
    first: Stream | None = None,
) -> Stream:
    """The batches of a stage.

    first: another stream of these data, which fetches shards into the node's cache. This one then fetches none itself,
    and reading a row whose shard is not in the cache raises `NotCached`.

    Raises `UserError` or `DataError` for data other than the stage's, or damaged beyond what a `quarantine` allows.
    """
    corpora = []
    for number, corpus in enumerate(data.corpora):
        fetching = first.corpora[number].rows if first else None
        if isinstance(fetching, RemoteReader):
            rows: Rows = CachedReader(fetching)
        else:
            rows = _train_rows(corpus, data.cache, pin, quarantine)
        corpora.append(Corpus(rows, corpus.weight))
    return Stream(corpora, seed=seed, batch=batch, micro_batch=micro_batch, window=data.window)


def open_held_out(data: DataSpec) -> list[HeldOut]:
    """The held-out rows of every corpus. Raises `UserError` for a corpus that has none."""
    return [
        HeldOut(corpus.name, corpus.weight, _held_out_rows(corpus, data.cache)) for corpus in data.corpora
    ]


def close(opened: Iterable[Corpus | HeldOut]) -> None:
    """Release the cached shards and end the threads that fetch them."""
    for part in opened:
        if isinstance(part.rows, RemoteReader):
            part.rows.close()


def release(stream: Stream) -> None:
    """Release the cached shards that this stream borrowed from its `first` stream."""
    for corpus in stream.corpora:
        if isinstance(corpus.rows, CachedReader):
            corpus.rows.release()


def describe(
    corpora: Sequence[CorpusSpec], *, window: int | None = None, cache: CacheSpec | None = None
) -> DataSpec:
    """Opens the corpora once and returns their spec, with all fingerprints pinned.

    Raises `DataError` for corpora that cannot be read or mixed, `UserError` for a corpus without held-out rows and for
    a cache too small for the shards that are read at a time.
    """
    cache = cache or CacheSpec()
    opened: list[Corpus] = []
    try:
        for corpus in corpora:
            opened.append(Corpus(_train_rows(corpus, cache), corpus.weight))
            close([HeldOut(corpus.name, corpus.weight, _held_out_rows(corpus, cache))])
        stream = Stream(opened, seed=0, batch=1, micro_batch=1, window=window)
        _check_cache([part.rows for part in opened], window, cache)
        for part in opened:
            _check_tokenizer(part.rows)
        tokenizer = _tokenizer_folder(corpora[0], opened[0].rows)
        return DataSpec(
            corpora=tuple(
                replace(corpus, fingerprint=part.rows.fingerprint)
                for corpus, part in zip(corpora, opened, strict=True)
            ),
            fingerprint=stream.fingerprint,
            seq_len=opened[0].rows.seq_len,
            vocabulary=opened[0].rows.tokenizer,
            tokenizer=tokenizer,
            window=window,
            cache=cache,
            tokenizer_files={
                path.relative_to(tokenizer).as_posix(): sha256_of(path)
                for path in tokenizer_files(Path(tokenizer))
            },
            packing=min((_packing(part.rows) for part in opened), key=PACKINGS.index),
        )
    finally:
        close(opened)


def cache_folder(cache: CacheSpec) -> Path:
    """The folder of the cache on this node."""
    if cache.folder is not None:
        return Path(cache.folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilm"


def _train_rows(
    corpus: CorpusSpec, cache: CacheSpec, pin: bool = False, quarantine: Quarantine | None = None
) -> Rows:
    if corpus.pair is not None:
        rows: Rows = _split_pair(corpus)[0]
    else:
        rows = _open(corpus.place, cache, corpus.fingerprint, pin, quarantine)
    if corpus.fingerprint and rows.fingerprint != corpus.fingerprint:
        raise UserError(
            f"data set {corpus.place} was replaced: its fingerprint is {rows.fingerprint[:16]}…, this run began with "
            f"{corpus.fingerprint[:16]}…; put the right one back, or start a new run with another --workdir"
        )
    return rows


def _held_out_rows(corpus: CorpusSpec, cache: CacheSpec) -> Rows:
    if corpus.pair is not None:
        return _split_pair(corpus)[1]
    advice = (
        "build it again with `minilm data build --held-out 0.01 …` (a recipe that names text: data.held_out)"
    )
    if not is_remote(corpus.place):
        folder = Path(corpus.place) / HELD_OUT
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"data set {corpus.place} has no held-out split, which every stage is measured on; {advice}"
            )
        return RowReader(folder)
    try:
        return _open(f"{corpus.place.rstrip('/')}/{HELD_OUT}", cache, "")
    except DataError as error:
        raise UserError(
            f"data set {corpus.place}: its held-out split, which every stage is measured on, cannot be read ({error}); "
            f"where it has none, {advice}"
        ) from error


def _open(
    place: str,
    cache: CacheSpec,
    fingerprint: str,
    pin: bool = False,
    quarantine: Quarantine | None = None,
) -> RowReader:
    if not is_remote(place):
        return RowReader(Path(place), pin=pin, quarantine=quarantine)
    return RemoteReader(
        place,
        cache=cache_folder(cache),
        max_cache_bytes=round(cache.gigabytes * 1e9),
        fingerprint=fingerprint or None,
        pin=pin,
        quarantine=quarantine,
    )


def _split_pair(corpus: CorpusSpec) -> tuple[RowRange, RowRange]:
    """The rows of a pair that are trained on, and the held-out rows at its end."""
    pair = corpus.pair
    assert pair is not None
    rows = IndexedRows(
        corpus.place,
        tokenizer=pair.tokenizer,
        seq_len=pair.seq_len,
        source_tokenizer=pair.source_tokenizer,
        fairseq_dict=pair.fairseq_dict,
        encoder=pair.encoder,
    )
    num_held_out = max(1, round(rows.num_rows * pair.held_out))
    if num_held_out >= rows.num_rows:
        raise UserError(
            f"{corpus.place}.bin holds {rows.num_rows} row of {pair.seq_len} tokens, and one is for measuring; "
            f"give more text, or a smaller data.seq_len"
        )
    num_train = rows.num_rows - num_held_out
    return RowRange(rows, 0, num_train), RowRange(rows, num_train, num_held_out)


def _packing(rows: Rows) -> str:
    return rows.manifest.packing if isinstance(rows, RowReader) else PACKINGS[0]  # a pair's rows are full


def _tokenizer_folder(corpus: CorpusSpec, rows: Rows) -> str:
    if corpus.pair is not None:
        return corpus.pair.tokenizer
    assert isinstance(rows, RowReader)
    return str((rows.folder / TOKENIZER).resolve())


def check_exported_tokenizer(data: DataSpec) -> None:
    """DataError when the files that an export is about to copy are not those that the stage began with."""
    for name, what in check_files(Path(data.tokenizer), data.tokenizer_files).items():
        raise DataError(
            f"{str(Path(data.tokenizer) / name)!r} is damaged ({what}), so no model is exported with it; put the file "
            "back (`minilm data repair`, or from a copy), then run the same command again: it goes on from here"
        )


def _check_tokenizer(rows: Rows) -> None:
    """DataError when the tokenizer beside a data set is not the one that it was made with."""
    if not isinstance(rows, RowReader):
        return
    damage = check_tokenizer(rows.folder, rows.manifest)
    if damage:
        raise DataError(
            f"data set {rows.location} is damaged: {damage[0]}; repair it with `minilm data repair`"
        )


def _check_cache(opened: Sequence[Rows], window: int | None, cache: CacheSpec) -> None:
    """Raises `UserError` if the cache cannot hold the shards that are read at a time: all of them, or with a windowed
    shuffle those of the current and the next window."""
    needed = 0
    for rows in opened:
        if isinstance(rows, RemoteReader):
            sizes = [shard.num_bytes for shard in rows.manifest.shards]
            needed += sum(sizes) if window is None else sum(sorted(sizes)[-2 * window :])
    if needed > cache.gigabytes * 1e9:
        advice = "a smaller data.window" if window else "data.window (a shuffle by so many shards at a time)"
        raise UserError(
            f"{needed / 1e9:.3g} GB of shards are read at a time, and data.cache_gigabytes is {cache.gigabytes:g}; "
            f"give {advice}, or a larger cache"
        )
