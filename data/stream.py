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
import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from data.errors import DataError
from data.manifest import Manifest, TokenizerInfo
from data.mixture import make_schedule
from data.order import Order, derive, make_order
from data.quarantine import Quarantine
from data.reader import Batch, Counters, RowReader
from data.windows import WindowedOrder, make_windowed_order

__all__ = ["Address", "Batch", "Corpus", "Counters", "RowReader", "Rows", "Stream", "share"]

_AHEAD = 4  # micro-batches read in advance


class Rows(Protocol):
    """Rows by number: a `RowReader`, or anything else that is read in place (data.sources)."""

    @property
    def num_rows(self) -> int: ...
    @property
    def shard_rows(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> TokenizerInfo: ...
    @property
    def counters(self) -> Counters: ...

    def read(self, row_ids: npt.ArrayLike) -> Batch: ...
    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None: ...


class Corpus(NamedTuple):
    """One of several corpora; weights need not add up to one."""

    rows: Rows
    weight: float


class Address(NamedTuple):
    """Where a row of a batch comes from."""

    corpus: int
    epoch: int
    row: int


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

    def row_ids(self, step: int, index: int) -> npt.NDArray[np.int64]:
        """int64 [micro_batch]: the row numbers of micro-batch `index` of `step`, in order."""
        corpus, counters = self._positions(step, index)
        return self._rows(corpus, counters) + self._first_rows[corpus]

    def addresses(self, step: int, index: int) -> list[Address]:
        """Corpus, epoch of that corpus, and row in that corpus, of every row of a micro-batch."""
        corpus, counters = self._positions(step, index)
        found = zip(corpus.tolist(), counters.tolist(), self._rows(corpus, counters).tolist(), strict=True)
        return [Address(c, counter // self.corpora[c].rows.num_rows, row) for c, counter, row in found]

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of optimiser step `step`: a pure function of both, the seed and the data."""
        corpus, counters = self._positions(step, index)
        rows = self._rows(corpus, counters)
        for number in range(len(self.corpora)):
            if (mine := counters[corpus == number]).size:
                self._enter_window(number, int(mine[0]))
        if len(self.corpora) == 1:
            return self.corpora[0].rows.read(rows)
        parts = [(number, np.flatnonzero(corpus == number)) for number in np.unique(corpus)]
        batches = [self.corpora[number].rows.read(rows[here]) for number, here in parts]
        back = torch.from_numpy(np.argsort(np.concatenate([here for _, here in parts])))
        ids = torch.cat([batch.input_ids for batch in batches])[back]
        mask = None
        if any(batch.mask is not None for batch in batches):
            whole = [
                torch.ones_like(b.input_ids, dtype=torch.bool) if b.mask is None else b.mask for b in batches
            ]
            mask = torch.cat(whole)[back]
        return Batch(ids, mask, torch.from_numpy(rows + self._first_rows[corpus]))

    def _positions(self, step: int, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(corpus, that corpus's counter) of every row of a micro-batch."""
        if step < 0 or not 0 <= index < self.num_micro_batches:
            raise DataError(
                f"micro-batch {index} of step {step} does not exist; a step has 0 to "
                f"{self.num_micro_batches - 1}"
            )
        first, count = step * self.batch + index * self._micro_batch_rows, self._micro_batch_rows
        return self._schedule.at(first, count)

    def _rows(self, corpus: npt.NDArray[np.int64], counters: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row numbers in each row's corpus; a corpus's counters are consecutive within a micro-batch."""
        if len(self.corpora) == 1:
            return self._orders[0].rows(int(counters[0]), len(counters))
        rows = np.empty(len(corpus), dtype=np.int64)
        for number in np.unique(corpus):
            here = np.flatnonzero(corpus == number)
            rows[here] = self._orders[number].rows(int(counters[here[0]]), len(here))
        return rows

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

        Close the iterator (or exhaust it) and the thread is gone. Errors of the thread are raised here.
        """
        wanted = ((step, index) for step in range(first_step, num_steps) for index in micro_batches)
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stopped.is_set():
                with suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def read_ahead() -> None:
            try:
                for step, index in wanted:
                    if stopped.is_set():
                        return
                    put(self.micro_batch(step, index))
                put(None)
            except BaseException as error:  # handed to the consumer, whatever it is
                put(error)

        thread = threading.Thread(target=read_ahead, name="minilm-read-ahead", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


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
        if corpus.rows.tokenizer != first.tokenizer:
            raise DataError(
                f"corpus {number} was tokenized with another vocabulary than the first one; "
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
