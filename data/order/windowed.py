"""The windowed order: a shuffle that needs only a few shards at a time, still in closed form.

Once an epoch the shards are permuted; the permuted shards are cut into windows of `window` shards; the rows
inside a window are permuted. While a window is read, only its shards (and those of the next window, being fetched)
must be on the local disk. Only the last shard of a data set may be short: the one slot where it falls shifts
all rows after it, so positions stay closed forms. One window of all shards is a full shuffle too, but
a different one from `permutation.Order`; keys come from paths (1, epoch) and (2, epoch, window), so neither
changes the other.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.order.permutation import derive, make_order, permute, unpermute

I64 = npt.NDArray[np.int64]


class WindowedOrder(NamedTuple):
    """The order of `num_rows` rows that lie in shards of `shard_rows` (the last may be short), by windows."""

    num_rows: int
    seed: int
    shard_rows: int
    window: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def num_windows(self) -> int:
        return -(-self.num_shards // self.window)

    def rows(self, first: int, count: int) -> I64:
        """int64 [count]: the data set's row numbers at run positions first, first + 1, …"""
        return self.at(np.arange(first, first + count, dtype=np.int64))

    def at(self, positions: I64) -> I64:
        """int64 [n]: the data set's row numbers at these run positions, computed one window at a time."""
        out = np.empty(len(positions), dtype=np.int64)
        left = np.arange(len(positions))
        while left.size:
            epoch, within = divmod(int(positions[left[0]]), self.num_rows)
            number = self._window_at(epoch, within)
            begin, size = self._span(epoch, number)
            offsets = positions[left] - (epoch * self.num_rows + begin)
            here = (offsets >= 0) & (offsets < size)
            key = np.full(int(here.sum()), derive(self.seed, 2, epoch, number), dtype=np.uint64)
            offsets = permute(offsets[here].astype(np.uint64), key, size).astype(np.int64)
            out[left[here]] = self._to_rows(epoch, number, offsets)
            left = left[~here]
        return out

    def position(self, row: int, epoch: int) -> int:
        """The run position at which `epoch` reads `row`: the inverse of `rows`."""
        shard, within = divmod(row, self.shard_rows)
        slot = self._slot_of(epoch, shard)
        number = slot // self.window
        begin, size = self._span(epoch, number)
        offset = (slot - number * self.window) * self.shard_rows + within
        if number * self.window <= self._short_slot(epoch) < slot:
            offset -= self._missing
        key = np.array([derive(self.seed, 2, epoch, number)], dtype=np.uint64)
        inside = unpermute(np.array([offset], dtype=np.uint64), key, size)
        return epoch * self.num_rows + begin + int(inside[0])

    def shards_of(self, epoch: int, number: int) -> I64:
        """The shards of window `number` of an epoch, which must be on the local disk while it is read."""
        return _shards_of(self, epoch, number)

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, window) that a run position falls into."""
        epoch, within = divmod(position, self.num_rows)
        return epoch, self._window_at(epoch, within)

    @property
    def _missing(self) -> int:
        """The number of rows that the last shard lacks."""
        return self.num_shards * self.shard_rows - self.num_rows

    def _slot_of(self, epoch: int, shard: int) -> int:
        key = np.array([derive(self.seed, 1, epoch)], dtype=np.uint64)
        return int(unpermute(np.array([shard], dtype=np.uint64), key, self.num_shards)[0])

    def _short_slot(self, epoch: int) -> int:
        return _short_slot(self, epoch)

    def _span(self, epoch: int, number: int) -> tuple[int, int]:
        """First row position (within the epoch) and number of rows of a window."""
        short = self._short_slot(epoch)
        first, last = number * self.window, min((number + 1) * self.window, self.num_shards)
        begin = first * self.shard_rows - (self._missing if short < first else 0)
        end = last * self.shard_rows - (self._missing if short < last else 0)
        return begin, end - begin

    def _window_at(self, epoch: int, within: int) -> int:
        """The window that holds row position `within` of an epoch."""
        rows_a_window = self.window * self.shard_rows
        holds_short = self._short_slot(epoch) // self.window
        begin, size = self._span(epoch, holds_short)
        if within < begin + size:
            return within // rows_a_window
        return (within + self._missing) // rows_a_window

    def _to_rows(self, epoch: int, number: int, offsets: I64) -> I64:
        """The row numbers at these offsets inside a window, counted over its shards laid end to end."""
        first = number * self.window
        short = self._short_slot(epoch) - first
        after_short = (short + 1) * self.shard_rows - self._missing
        if 0 <= short < self.window:
            offsets = np.where(offsets >= after_short, offsets + self._missing, offsets)
        slots, rows = np.divmod(offsets, self.shard_rows)
        return self.shards_of(epoch, number)[slots] * self.shard_rows + rows


@lru_cache(maxsize=64)  # used for every micro-batch, and as costly to compute as its rows
def _short_slot(order: WindowedOrder, epoch: int) -> int:
    return order._slot_of(epoch, order.num_shards - 1)


@lru_cache(maxsize=64)
def _shards_of(order: WindowedOrder, epoch: int, number: int) -> I64:
    slots = np.arange(number * order.window, min((number + 1) * order.window, order.num_shards))
    keys = np.full(len(slots), derive(order.seed, 1, epoch), dtype=np.uint64)
    shards = permute(slots.astype(np.uint64), keys, order.num_shards).astype(np.int64)
    shards.flags.writeable = False
    return shards


def make_windowed_order(num_rows: int, seed: int, shard_rows: int, window: int) -> WindowedOrder:
    """A checked `WindowedOrder`. DataError if a number is out of range."""
    make_order(num_rows, seed)
    if window < 1:
        raise DataError(f"a window of {window} shards holds nothing; give at least 1")
    return WindowedOrder(num_rows, seed, shard_rows, window)
