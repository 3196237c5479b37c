"""Rows of step t: `Stream` knows which rows a micro-batch holds and reads them, alone or ahead on a thread.

The rows of micro-batch `index` of step `step` are a pure function of (seed, step, index, data, order
parameters): no iterator state, so resuming costs nothing and any worker count sees the same batches. The
micro-batch is the unit of determinism; `share` says which of them a worker computes.

One data set is read in the order of data.order, or by windows of shards (data.windows). Several corpora are
mixed by weights (data.mixture); each has a counter, an order and epochs of its own. Left out: worker
processes and shared memory; one thread reads ahead.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minilm.data.errors import DataError
from minilm.data.format.manifest import Manifest
from minilm.data.order.mixture import make_schedule
from minilm.data.order.permutation import Order, derive, make_order
from minilm.data.order.windowed import WindowedOrder, make_windowed_order
from minilm.data.read.prefetch import read_ahead
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import I64, Batch, Corpus, Counters, Rows

__all__ = ["Address", "Batch", "Corpus", "Counters", "RowReader", "Rows", "Stream", "share"]


_AHEAD = 4  # the next micro-batches are read when fewer are waiting


_ROWS_AT_ONCE = 2048


_TOKENS_AT_ONCE = 1 << 20  # 8 MB of int64


class Address(NamedTuple):
    """Where a row of a batch comes from."""

    corpus: int
    epoch: int
    row: int


class _Part(NamedTuple):
    """What is read of one corpus: at which `counters` of its own, which `rows` of its own, for which `places` of the
    batch."""

    number: int
    places: I64
    counters: I64
    rows: I64


class Stream:
    """The batches of a run, each of `batch` rows, cut into micro-batches.

    `source` is the folder of a data set, an object with rows, or several weighted corpora. `window`: shuffle
    by windows of so many shards instead of fully. `pin`: batches in page-locked memory. Row numbers of a
    batch count over all corpora laid end to end. `pin` and `quarantine` are for a folder; other sources were
    opened with their own.
    """

    def __init__(
        self,
        source: Path | Rows | Sequence[Corpus],
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        window: int | None = None,
        pin: bool = False,
        quarantine: Quarantine | None = None,
    ):
        if batch < 1 or micro_batch < 1 or batch % micro_batch:
            raise DataError(
                f"batch {batch} cannot be cut into micro-batches of {micro_batch} rows; "
                "micro_batch must divide batch, and both be at least 1"
            )
        self.corpora = _corpora(source, pin, quarantine)
        self.batch, self.num_micro_batches = batch, batch // micro_batch
        self._micro_batch_rows = micro_batch
        self._schedule = make_schedule([corpus.weight for corpus in self.corpora])
        alone = len(self.corpora) == 1
        self._orders = [
            _order(corpus.rows, seed if alone else derive(seed, 4, number), window)
            for number, corpus in enumerate(self.corpora)
        ]
        self._windows: dict[int, tuple[int, int]] = {}
        ends = np.cumsum([corpus.rows.num_rows for corpus in self.corpora])
        self._first_rows = np.concatenate([[0], ends[:-1]])

    @property
    def manifest(self) -> Manifest:
        """The manifest of the (first) data set."""
        rows = self.corpora[0].rows
        assert isinstance(rows, RowReader), "rows that are read in place have no manifest"
        return rows.manifest

    @property
    def manifests(self) -> list[Manifest]:
        """The manifests of all corpora that are data sets of ours, in order."""
        return [corpus.rows.manifest for corpus in self.corpora if isinstance(corpus.rows, RowReader)]

    @property
    def fingerprint(self) -> str:
        """Identity of what is read: the data set's own, or one over all corpora and weights."""
        if len(self.corpora) == 1:
            return self.corpora[0].rows.fingerprint
        parts = [[corpus.rows.fingerprint, float(corpus.weight)] for corpus in self.corpora]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def counters(self) -> Counters:
        """Sums over all corpora."""
        return Counters(
            *(sum(values) for values in zip(*(c.rows.counters for c in self.corpora), strict=True))
        )

    def row_ids(self, step: int, index: int) -> I64:
        """int64 [micro_batch]: the row numbers of micro-batch `index` of `step`, in order."""
        return self._numbers(self._parts([(step, index)]))

    def addresses(self, step: int, index: int) -> list[Address]:
        """Corpus, epoch of that corpus, and row in that corpus, of every row of a micro-batch."""
        found = np.empty((self._micro_batch_rows, 3), dtype=np.int64)
        for number, places, counters, rows in self._parts([(step, index)]):
            epochs = counters // self.corpora[number].rows.num_rows
            found[places] = np.stack([np.full(len(rows), number), epochs, rows], axis=1)
        return [Address(*address) for address in found.tolist()]

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of optimiser step `step`: a pure function of both, the seed and the data."""
        parts = self._parts([(step, index)])
        for part in parts:
            self._enter_window(part.number, int(part.counters[0]))
        return self._read(parts)

    def _parts(self, wanted: Sequence[tuple[int, int]]) -> list[_Part]:
        """The rows of these micro-batches (step, index) laid end to end, by corpus."""
        for step, index in wanted:
            if step < 0 or not 0 <= index < self.num_micro_batches:
                raise DataError(
                    f"micro-batch {index} of step {step} does not exist; a step has 0 to "
                    f"{self.num_micro_batches - 1}"
                )
        size = self._micro_batch_rows
        first = np.array([step * self.batch + index * size for step, index in wanted], dtype=np.int64)
        corpus, counters = self._schedule.at((first[:, None] + np.arange(size)).ravel())
        parts = []
        for number, order in enumerate(self._orders):
            if (places := np.flatnonzero(corpus == number)).size:
                mine = counters[places]
                parts.append(_Part(number, places, mine, order.at(mine)))
        return parts

    def _numbers(self, parts: Sequence[_Part]) -> I64:
        """Row numbers over all corpora, in the order of the batch."""
        numbers = np.empty(sum(len(part.rows) for part in parts), dtype=np.int64)
        for part in parts:
            numbers[part.places] = part.rows + self._first_rows[part.number]
        return numbers

    def _read(self, parts: Sequence[_Part]) -> Batch:
        batches = [self.corpora[part.number].rows.read(part.rows) for part in parts]
        if len(self.corpora) == 1:
            return batches[0]
        numbers = self._numbers(parts)
        ids = torch.empty((len(numbers), self.corpora[0].rows.seq_len), dtype=torch.int64)
        mask = None
        if any(batch.mask is not None for batch in batches):
            mask = torch.ones(ids.shape, dtype=torch.bool)
        for part, batch in zip(parts, batches, strict=True):
            ids.numpy()[part.places] = batch.input_ids.numpy()
            if mask is not None and batch.mask is not None:
                mask.numpy()[part.places] = batch.mask.numpy()
        return Batch(ids, mask, torch.from_numpy(numbers))

    def _readings(self, wanted: Iterator[tuple[int, int]]) -> Iterator[list[Batch]]:
        """These micro-batches: the first one alone, then more and more of them at once."""
        rows = min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // self.corpora[0].rows.seq_len)
        most, count = max(1, -(-rows // self._micro_batch_rows)), 1
        while several := list(islice(wanted, count)):
            count = min(2 * count, most)
            if (batches := self._at_once(several)) is not None:
                yield batches
                continue
            for step, index in several:
                yield [self.micro_batch(step, index)]

    def _at_once(self, wanted: Sequence[tuple[int, int]]) -> list[Batch] | None:
        """Several micro-batches by one read, as views of its batch; None where one after the other is right: a window
        begins, something has to be fetched or compared first, or reading fails."""
        if len(wanted) == 1 or not all(map(self._at_hand, parts := self._parts(wanted))):
            return None
        with suppress(Exception):  # it comes back from the micro-batch that it belongs to
            whole, size = self._read(parts), self._micro_batch_rows
            masks = [None] * len(wanted) if whole.mask is None else whole.mask.split(size)
            return [
                Batch(ids, None if mask is None or mask.all() else mask, rows)
                for ids, mask, rows in zip(
                    whole.input_ids.split(size), masks, whole.row_ids.split(size), strict=True
                )
            ]
        return None

    def _at_hand(self, part: _Part) -> bool:
        order = self._orders[part.number]
        if isinstance(order, WindowedOrder):
            ends = {order.window_of(int(part.counters.min())), order.window_of(int(part.counters.max()))}
            if ends != {self._windows.get(part.number)}:
                return False
        return self.corpora[part.number].rows.at_hand(part.rows)

    def _enter_window(self, number: int, counter: int) -> None:
        """Tell a corpus which window it is in, and which comes next, whenever that changes."""
        order = self._orders[number]
        if not isinstance(order, WindowedOrder):
            return
        epoch, window = order.window_of(counter)
        if self._windows.get(number) == (epoch, window):
            return
        self._windows[number] = (epoch, window)
        last = window + 1 == order.num_windows
        coming = order.shards_of(epoch + 1, 0) if last else order.shards_of(epoch, window + 1)
        self.corpora[number].rows.announce(order.shards_of(epoch, window), coming)

    def position(self, row: int, epoch: int) -> tuple[int, int]:
        """(step, place in the batch) at which `epoch` of the row's corpus reads row number `row`."""
        total = int(self._first_rows[-1]) + self.corpora[-1].rows.num_rows
        if not 0 <= row < total:
            raise DataError(f"row {row} does not exist; these data have rows 0 to {total - 1}")
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        counter = self._orders[number].position(row - int(self._first_rows[number]), epoch)
        return divmod(self._schedule.position(number, counter), self.batch)

    def iterate(self, first_step: int, num_steps: int, micro_batches: range) -> Generator[Batch, None, None]:
        """For steps first_step … num_steps - 1 in order, these micro-batches in order; a thread reads ahead.

        Close the iterator (or exhaust it) and the thread is gone. Errors of the thread are raised here, behind all
        micro-batches before them. Several micro-batches may be views of one buffer.
        """
        wanted = ((step, index) for step in range(first_step, num_steps) for index in micro_batches)
        return read_ahead(self._readings(wanted), _AHEAD)


def _corpora(
    source: Path | Rows | Sequence[Corpus], pin: bool, quarantine: Quarantine | None
) -> list[Corpus]:
    if isinstance(source, (str, Path)):
        return [Corpus(RowReader(Path(source), pin=pin, quarantine=quarantine), 1.0)]
    if not isinstance(source, Sequence):
        return [Corpus(source, 1.0)]
    corpora = list(source)
    if not corpora:
        raise DataError("no corpus was given; name at least one data set")
    first = corpora[0].rows
    for number, corpus in enumerate(corpora[1:], start=2):
        if corpus.rows.seq_len != first.seq_len:
            raise DataError(
                f"corpus {number} has rows of {corpus.rows.seq_len} tokens, the first one of "
                f"{first.seq_len}; "
                "corpora that are mixed need the same seq_len: build one of them again"
            )
        if differs := corpus.rows.tokenizer.difference(first.tokenizer):
            raise DataError(
                f"corpus {number} was tokenized with another {differs} than the first one; "
                "build one of them again with the teacher's tokenizer"
            )
    return corpora


def _order(rows: Rows, seed: int, window: int | None) -> Order | WindowedOrder:
    if window is None:
        return make_order(rows.num_rows, seed)
    return make_windowed_order(rows.num_rows, seed, rows.shard_rows, window)


def share(num_micro_batches: int, rank: int, world_size: int) -> range:
    """The contiguous run of micro-batches that worker `rank` of `world_size` computes; first ranks take one
    more."""
    if not 0 <= rank < world_size:
        raise DataError(
            f"rank {rank} does not exist among {world_size} workers; allowed: 0 to {world_size - 1}"
        )
    small, extra = divmod(num_micro_batches, world_size)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))
