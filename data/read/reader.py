"""Rows by number, straight from memory-mapped shards.

Every block's checksum is compared on its first use, so damage is an error that names shard, block and offset;
no row is ever skipped. With a quarantine, rows of the blocks on its list are never read: they come as padding of
length 0. Shards are mapped when first needed: opening costs the manifest alone, whatever the number of rows. Left
out: which rows a step needs (data.stream), and remote storage.
"""

import logging
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minilm.data.errors import DamageError
from minilm.data.format.manifest import Shard, TokenizerInfo, load_manifest
from minilm.data.read.mapped_shards import MappedShards
from minilm.data.read.quarantine import Quarantine, damaged_blocks
from minilm.data.read.rows import Batch, Counters

log = logging.getLogger("minilm.data")


class RowReader:
    """Random access to the rows of the data set in `folder`; `pin` puts batches into page-locked memory.

    With a `quarantine`, rows of its blocks are masked, and damage that is new raises QuarantineGrew.
    """

    def __init__(
        self, folder: Path, *, verify: bool = True, pin: bool = False, quarantine: Quarantine | None = None
    ):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.pin = pin
        self._num_rows = self._num_masked = 0  # handed out
        self.quarantine = quarantine
        masked = None if quarantine is None else quarantine.masked(self.manifest, self.place)
        self._masked = masked if masked is not None and masked.any() else None
        self._mapped = MappedShards(self.folder, self.manifest, self.locate, verify=verify, masked=masked)
        self._lock = threading.RLock()  # nobody may unmap what another thread is copying

    @property
    def counters(self) -> Counters:
        row_bytes = self._num_rows * self.manifest.layout.row_bytes
        checked = self._mapped.num_checked
        return Counters(self._num_rows, row_bytes, checked, masked_rows=self._num_masked)

    @property
    def place(self) -> str:
        """Where the data come from, for people."""
        return str(self.folder)

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
        """Copy the rows `wanted` into `tokens` ([n, seq_len] of the stored dtype); their lengths (0: in quarantine),
        None if all whole."""
        manifest = self.manifest
        if wanted.size and np.maximum.reduce(wanted.view(np.uint64)) >= manifest.rows:  # below zero is huge
            manifest.place(int(wanted.min()))
            manifest.place(int(wanted.max()))
        with self._lock:
            if self._masked is None:
                lengths = self._gather_sound(wanted, tokens)
            else:
                lengths = self._gather_around(wanted, tokens, self._masked[wanted // manifest.rows_per_block])
            self._num_rows += len(wanted)
        return lengths

    def _gather_around(
        self, wanted: npt.NDArray[np.int64], tokens: npt.NDArray, masked: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64] | None:
        """`gather` where some rows (bool [n]) are in quarantine: padding, of length 0."""
        if not masked.any():
            return self._gather_sound(wanted, tokens)
        sound = ~masked
        part = np.empty((int(sound.sum()), tokens.shape[1]), dtype=tokens.dtype)
        found = self._gather_sound(wanted[sound], part)
        tokens[sound] = part
        tokens[masked] = max(0, self.manifest.tokenizer.pad_id)
        lengths = np.zeros(len(wanted), dtype=np.int64)
        lengths[sound] = self.manifest.seq_len if found is None else found
        self._num_masked += int(masked.sum())
        return lengths

    def _gather_sound(
        self, wanted: npt.NDArray[np.int64], tokens: npt.NDArray
    ) -> npt.NDArray[np.int64] | None:
        """`gather` of rows that are not in quarantine. A shard that is damaged gets one second look."""
        looked: set[int] = set()
        while True:
            try:
                return self._mapped.gather(wanted, tokens)
            except DamageError as error:
                if error.shard in looked:
                    raise
                looked.add(error.shard)
                self._mapped.forget(error.shard)
                bad = self.look_again(self.manifest.shard(error.shard), error)
                if bad and self.quarantine is not None:
                    self.quarantine.add(self.manifest, self.place, bad, str(error))
                log.warning("%s: it was read wrongly once, and is whole where it comes from", error)

    def look_again(self, shard: Shard, error: DamageError) -> list[int]:
        """The blocks of a shard that are damaged where the data come from; none when reading it again helps.

        Raises `error` unless there is a quarantine to put them into.
        """
        if self.quarantine is None or self.quarantine.path is None:
            raise error
        return damaged_blocks(self.locate(shard), self.folder, self.manifest, shard)

    def locate(self, shard: Shard) -> Path:
        """Where the file of a shard lies."""
        return self.folder / shard.name

    def at_hand(self, row_ids: npt.NDArray[np.int64]) -> bool:
        """Whether these rows can be read at once: no block of theirs has to be fetched, mapped or compared first."""
        blocks = row_ids // self.manifest.rows_per_block
        with self._lock:
            ready = self._mapped.ready(blocks)
        return bool((ready if self._masked is None else ready | self._masked[blocks]).all())

    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None:
        """Called when a windowed stream enters a window: its shards and the next window's. Local files need no care."""

    def forget(self, shard: int) -> None:
        """Unmap a shard; it is mapped again when it is needed."""
        with self._lock:
            self._mapped.forget(shard)
