"""Rows by number, straight from memory-mapped shards.

Every block's checksum is compared on its first use, so damage is an error that names shard, block and offset;
no row is ever skipped. Shards are mapped when first needed and at most 256 stay mapped: opening costs the
manifest alone, whatever the number of rows. Left out: which rows a step needs (data.stream), and remote
storage.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.manifest import Shard, TokenizerInfo, load_manifest
from data.mapped import MappedShard

_MAX_OPEN_SHARDS = 256


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
        self.verify, self.pin = verify, pin
        self._counters = Counters()
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        self._verified: dict[int, npt.NDArray[np.bool_]] = {}

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
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < manifest.rows):
            manifest.place(int(wanted.min()))
            manifest.place(int(wanted.max()))
        blocks, rows = np.divmod(wanted, manifest.rows_per_block)
        shards, blocks = np.divmod(blocks, manifest.blocks_per_shard)
        lengths = np.empty(len(wanted), dtype=np.int64) if manifest.layout.has_lengths else None
        num_checked = 0
        for shard, here in _groups(shards):
            mapped = self._open(shard)
            if self.verify:
                num_checked += mapped.verify(blocks[here])
            if isinstance(here, slice):
                mapped.gather(blocks, rows, tokens)
            else:
                tokens[here] = mapped.gather(blocks[here], rows[here], np.empty_like(tokens[: len(here)]))
            if lengths is not None:
                lengths[here] = mapped.gather_lengths(blocks[here], rows[here])
        done = self._counters
        self._counters = Counters(
            done.rows + len(wanted), done.row_bytes + tokens.nbytes, done.checked_blocks + num_checked
        )
        return lengths

    def locate(self, shard: Shard) -> Path:
        """Where the file of a shard lies."""
        return self.folder / shard.name

    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None:
        """Told when a windowed stream enters a window: its shards and the next window's. Local files need no care."""

    def forget(self, shard: int) -> None:
        """Unmap a shard; it is mapped again when needed."""
        self._shards.pop(shard, None)

    def _open(self, shard: int) -> MappedShard:
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        while len(self._shards) >= _MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)
        info = self.manifest.shard(shard)
        verified = self._verified.setdefault(shard, np.zeros(info.num_blocks, dtype=bool))
        mapped = MappedShard(self.folder, self.manifest, shard, verified, self.locate(info))
        self._shards[shard] = mapped
        return mapped


def _groups(shards: npt.NDArray[np.int64]) -> Iterator[tuple[int, slice | npt.NDArray[np.int64]]]:
    """(shard, where it stands in `shards`) for each shard; a slice of everything where there is only one."""
    if not shards.size:
        return
    if (shards == shards[0]).all():
        yield int(shards[0]), slice(None)
        return
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    for here in np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        yield int(shards[here[0]]), here
