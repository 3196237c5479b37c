"""What a reader of rows offers, and what it gives out."""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from minilm.data.format.manifest import TokenizerInfo

I64 = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """`input_ids` int64 [rows, seq_len]; `mask` bool [rows, seq_len] or None without padding; `row_ids` int64
    [rows]."""

    input_ids: Tensor
    mask: Tensor | None
    row_ids: Tensor


class Counters(NamedTuple):
    """What a reader did so far: rows and bytes of tokens handed out, blocks whose checksum was compared; for remote
    data also shards that were in the cache already, bytes fetched, and requests tried again. `masked_rows` of the
    rows are in quarantine."""

    rows: int = 0
    row_bytes: int = 0
    checked_blocks: int = 0
    cache_hits: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    masked_rows: int = 0


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
    def at_hand(self, row_ids: I64) -> bool: ...
    def announce(self, current: I64, coming: I64) -> None: ...


class Corpus(NamedTuple):
    """One of several corpora; weights need not add up to one."""

    rows: Rows
    weight: float
