"""Rows by number, straight from memory-mapped shards.

Every block's checksum is compared on its first use, so damage is an error that names shard, block and offset;
no row is ever skipped. Shards are mapped when first needed and at most 256 stay mapped: opening costs the
manifest alone, whatever the number of rows. Left out: which rows a step needs (data.stream), and remote
storage.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.manifest import Shard, TokenizerInfo, load_manifest
from data.mapped import MappedShards


class Batch(NamedTuple):
    """`input_ids` int64 [rows, seq_len]; `mask` bool [rows, seq_len] or None without padding; `row_ids` int64
    [rows]."""

    input_ids: Tensor
    mask: Tensor | None
    row_ids: Tensor


class Counters(NamedTuple):
    """What a reader did so far: rows and bytes of tokens handed out, blocks whose checksum was compared; for remote
    data also shards that were in the cache already, bytes fetched, and requests tried again."""

    rows: int = 0
    row_bytes: int = 0
    checked_blocks: int = 0
    cache_hits: int = 0
    fetched_bytes: int = 0
    retries: int = 0


class RowReader:
    """Random access to the rows of the data set in `folder`; `pin` puts batches into page-locked memory."""

    def __init__(self, folder: Path, *, verify: bool = True, pin: bool = False):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.pin = pin
        self._counters = Counters()
        self._mapped = MappedShards(self.folder, self.manifest, self.locate, verify=verify)
        self._lock = threading.RLock()  # nobody may unmap what another thread is copying

    @property
    def counters(self) -> Counters:
        return self._counters

    @property
    def num_rows(self) -> int:
        return self.manifest.rows

    @property
    def shard_rows(self) -> int:
        return self.manifest.rows_per_block * self.manifest.blocks_per_shard

    @property
    def seq_len(self) -> int:
        return self.manifest.seq_len

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.manifest.tokenizer

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows of these numbers, in the order given. DataError names shard, block and offset of
        damage."""
        wanted = np.array(row_ids, dtype=np.int64).reshape(-1)
        tokens = np.empty((len(wanted), self.manifest.seq_len), dtype=self.manifest.dtype)
        lengths = self.gather(wanted, tokens)
        ids = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=self.pin)
        np.copyto(ids.numpy(), tokens)
        mask = None
        if lengths is not None and (lengths < self.manifest.seq_len).any():
            mask = torch.from_numpy(np.arange(self.manifest.seq_len) < lengths[:, None])
            mask = mask.pin_memory() if self.pin else mask
        return Batch(ids, mask, torch.from_numpy(wanted))

    def gather(self, wanted: npt.NDArray[np.int64], tokens: npt.NDArray) -> npt.NDArray[np.int64] | None:
        """Copy the rows `wanted` into `tokens` ([n, seq_len] of the stored dtype); their lengths, None if all
        whole."""
        manifest = self.manifest
        if wanted.size and wanted.view(np.uint64).max() >= manifest.rows:  # below zero is huge, seen unsigned
            manifest.place(int(wanted.min()))
            manifest.place(int(wanted.max()))
        with self._lock:
            lengths = self._mapped.gather(wanted, tokens)
        done = self._counters
        self._counters = Counters(
            done.rows + len(wanted), done.row_bytes + tokens.nbytes, self._mapped.num_checked
        )
        return lengths

    def locate(self, shard: Shard) -> Path:
        """Where the file of a shard lies."""
        return self.folder / shard.name

    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None:
        """Told when a windowed stream enters a window: its shards and the next window's. Local files need no care."""

    def forget(self, shard: int) -> None:
        """Unmap a shard; it is mapped again when it is needed."""
        with self._lock:
            self._mapped.forget(shard)
