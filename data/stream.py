"""The rows of step t: `Stream` knows which rows a micro-batch holds and reads them, ahead on a thread if asked.

The rows of micro-batch `index` of step `step` are a pure function of (seed, step, index, data, order
parameters): no iterator state, so resuming costs nothing and any worker count sees the same batches. The
micro-batch is the unit of determinism; `partition` says which of them a worker computes.

One data set is read in the order of order.permutation, or by windows of shards (order.windowed). Several corpora are
mixed by weights (order.mixture); each has a counter, an order and epochs of its own. Left out: worker
processes and shared memory; one thread reads ahead.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minilm.data.errors import DataError
from minilm.data.order.mixture import make_schedule
from minilm.data.order.permutation import Order, derive, make_order
from minilm.data.order.windowed import WindowedOrder, make_windowed_order
from minilm.data.read.prefetch import prefetch
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import I64, Batch, Corpus, Counters, Rows

_DEPTH = 4  # micro-batches that are read ahead


class Address(NamedTuple):
    """Where a row of a batch comes from."""

    corpus: int
    epoch: int
    row: int


class _Part(NamedTuple):
    """The rows of a batch that come from one corpus: their `indices` in the batch, the corpus's own `counters`, and the
    corpus's own row numbers."""

    number: int
    indices: I64
    counters: I64
    rows: I64


class Stream:
    """The batches of a run, each of `batch` rows, cut into micro-batches.

    `source` is the folder of a data set, an object with rows, or several weighted corpora. `window` is the number of
    shards in a window of the shuffle, None for a full shuffle. `pin` puts batches into page-locked memory. Row numbers
    of a batch count over all corpora laid end to end. `pin` and `quarantine` apply to a folder; other sources were
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
    def fingerprint(self) -> str:
        """The identity of what is read: the data set's own, or one over all corpora and weights."""
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
        return self._numbers(self._parts(step, index))

    def addresses(self, step: int, index: int) -> list[Address]:
        """Corpus, epoch of that corpus, and row in that corpus, for every row of a micro-batch."""
        found = np.empty((self._micro_batch_rows, 3), dtype=np.int64)
        for number, indices, counters, rows in self._parts(step, index):
            epochs = counters // self.corpora[number].rows.num_rows
            found[indices] = np.stack([np.full(len(rows), number), epochs, rows], axis=1)
        return [Address(*address) for address in found.tolist()]

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of optimiser step `step`: a pure function of both, the seed and the data."""
        parts = self._parts(step, index)
        for part in parts:
            self._enter_window(part.number, int(part.counters[0]))
        batches = [self.corpora[part.number].rows.read(part.rows) for part in parts]
        if len(self.corpora) == 1:
            return batches[0]
        numbers = self._numbers(parts)
        ids = torch.empty((len(numbers), self.corpora[0].rows.seq_len), dtype=torch.int64)
        mask = None
        if any(batch.mask is not None for batch in batches):
            mask = torch.ones(ids.shape, dtype=torch.bool)
        for part, batch in zip(parts, batches, strict=True):
            ids.numpy()[part.indices] = batch.input_ids.numpy()
            if mask is not None and batch.mask is not None:
                mask.numpy()[part.indices] = batch.mask.numpy()
        ends = None
        if any(batch.ends is not None for batch in batches):
            ends = torch.zeros(ids.shape, dtype=torch.bool)
            for part, batch in zip(parts, batches, strict=True):
                ends.numpy()[part.indices] = batch.all_ends().numpy()
        return Batch(ids, mask, torch.from_numpy(numbers), ends)

    def _parts(self, step: int, index: int) -> list[_Part]:
        """The rows of a micro-batch, by corpus."""
        if step < 0 or not 0 <= index < self.num_micro_batches:
            raise DataError(
                f"micro-batch {index} of step {step} does not exist; a step has 0 to {self.num_micro_batches - 1}"
            )
        size = self._micro_batch_rows
        first = step * self.batch + index * size
        corpus, counters = self._schedule.at(np.arange(first, first + size, dtype=np.int64))
        parts = []
        for number, order in enumerate(self._orders):
            if (indices := np.flatnonzero(corpus == number)).size:
                mine = counters[indices]
                parts.append(_Part(number, indices, mine, order.at(mine)))
        return parts

    def _numbers(self, parts: Sequence[_Part]) -> I64:
        """Row numbers over all corpora, in the order of the batch."""
        numbers = np.empty(self._micro_batch_rows, dtype=np.int64)
        for part in parts:
            numbers[part.indices] = part.rows + self._first_rows[part.number]
        return numbers

    def _enter_window(self, number: int, counter: int) -> None:
        """Tell a corpus, when it enters a window, which shards belong to that window and to the next."""
        order = self._orders[number]
        if not isinstance(order, WindowedOrder):
            return
        epoch, window = order.window_of(counter)
        if self._windows.get(number) == (epoch, window):
            return
        self._windows[number] = (epoch, window)
        last = window + 1 == order.num_windows
        coming = order.shards_of(epoch + 1, 0) if last else order.shards_of(epoch, window + 1)
        self.corpora[number].rows.enter_window(order.shards_of(epoch, window), coming)

    def position(self, row: int, epoch: int) -> tuple[int, int]:
        """(step, index in the batch) at which `epoch` of the row's corpus reads row number `row`."""
        total = int(self._first_rows[-1]) + self.corpora[-1].rows.num_rows
        if not 0 <= row < total:
            raise DataError(f"row {row} does not exist; these data have rows 0 to {total - 1}")
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        counter = self._orders[number].position(row - int(self._first_rows[number]), epoch)
        return divmod(self._schedule.position(number, counter), self.batch)

    def iterate(self, first_step: int, num_steps: int, micro_batches: range) -> Generator[Batch, None, None]:
        """These micro-batches of steps first_step … num_steps - 1, in order; a thread reads them ahead.

        Close the iterator (or exhaust it) and the thread is gone. Errors of the thread are raised here, after all
        micro-batches before them.
        """
        steps = range(first_step, num_steps)
        return prefetch((self.micro_batch(step, index) for step in steps for index in micro_batches), _DEPTH)


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


def partition(num_micro_batches: int, rank: int, world_size: int) -> range:
    """The contiguous run of micro-batches that worker `rank` of `world_size` computes; where the division leaves a
    remainder, the first ranks take one more each."""
    if not 0 <= rank < world_size:
        raise DataError(
            f"rank {rank} does not exist among {world_size} workers; allowed: 0 to {world_size - 1}"
        )
    small, extra = divmod(num_micro_batches, world_size)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))
