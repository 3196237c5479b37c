"""Rows by number: the base class of all readers, and what they hand out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo

I64 = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """`input_ids` int64 [rows, seq_len]; `mask` bool [rows, seq_len], None if no row has padding; `row_ids` int64
    [rows]."""

    input_ids: Tensor
    mask: Tensor | None
    row_ids: Tensor


class Counters(NamedTuple):
    """What a reader has done: rows and bytes of tokens handed out (`masked_rows` of them in quarantine), and blocks
    whose checksum was compared. For remote data also shards found in the cache, bytes fetched, and requests retried."""

    rows: int = 0
    row_bytes: int = 0
    checked_blocks: int = 0
    cache_hits: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    masked_rows: int = 0


class Rows(ABC):
    """Random access to `num_rows` rows of `seq_len` tokens. A windowed shuffle counts in shards of `shard_rows` rows;
    `fingerprint` is the identity of the data."""

    num_rows: int
    shard_rows: int
    seq_len: int
    fingerprint: str
    tokenizer: TokenizerInfo

    @property
    @abstractmethod
    def counters(self) -> Counters:
        """What was read so far."""

    @abstractmethod
    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows with these numbers, in the order given. DataError names a row that does not exist or cannot be
        read."""

    def enter_window(self, current: I64, coming: I64) -> None:  # noqa: B027  (local files have nothing to do)
        """Called when a windowed stream enters a window: the shards of that window and of the next one."""

    def checked(self, row_ids: npt.ArrayLike) -> I64:
        """`row_ids` as a new int64 array [n]. DataError names the first that does not exist."""
        wanted = np.array(row_ids, dtype=np.int64).reshape(-1)
        for row in wanted[(wanted < 0) | (wanted >= self.num_rows)][:1]:
            raise DataError(f"row {row} does not exist; these data have rows 0 to {self.num_rows - 1}")
        return wanted


class Corpus(NamedTuple):
    """One of several corpora; weights need not add up to one."""

    rows: Rows
    weight: float
