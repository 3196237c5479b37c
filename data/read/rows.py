"""Rows by number: the base class of all readers, and what they hand out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo

I64 = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """`input_ids` int64 [rows, seq_len]; `mask` bool [rows, seq_len], None if no row has padding; `row_ids` int64
    [rows]. `ends` bool [rows, seq_len]: the last tokens of the documents in the rows; None: a row is one sequence."""

    input_ids: Tensor
    mask: Tensor | None
    row_ids: Tensor
    ends: Tensor | None = None

    @property
    def sequences(self) -> tuple[Tensor, Tensor | None]:
        """What is computed, each as if it were alone: the rows, or all documents in them, in their order. int64
        [sequences, tokens], and bool of the same shape, None if none has padding. At least one, if need be an empty
        one."""
        if self.ends is None:
            return self.input_ids, self.mask
        rows, last = self.ends.nonzero(as_tuple=True)
        if not len(rows):
            return self.input_ids[:1], torch.zeros_like(self.input_ids[:1], dtype=torch.bool)
        begins = torch.cat([last.new_zeros(1), last[:-1] + 1])
        begins[1:][rows[1:] > rows[:-1]] = 0
        lengths = last + 1 - begins
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        places = (begins[:, None] + columns).clamp(max=self.input_ids.shape[1] - 1)
        ids = self.input_ids[rows[:, None], places].masked_fill(~mask, 0)
        return ids, None if mask.all() else mask

    @property
    def first_documents(self) -> "Batch":
        """The same rows without all documents but the first, so that there is one of `sequences` for each row."""
        return self if self.ends is None else self._replace(ends=self.ends & (self.ends.cumsum(dim=1) == 1))

    def row_of(self, sequence: int) -> int:
        """The number of the row that holds this one of `sequences`."""
        return int(self.row_ids[sequence if self.ends is None else self.ends.nonzero()[sequence, 0]])

    def all_ends(self) -> Tensor:
        """`ends`, where a row that is one sequence ends with its last valid token."""
        if self.ends is not None:
            return self.ends
        valid = torch.ones_like(self.input_ids, dtype=torch.bool) if self.mask is None else self.mask
        columns = torch.arange(1, valid.shape[1] + 1)
        last = (valid * columns).amax(dim=1, keepdim=True)
        return columns == last


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
