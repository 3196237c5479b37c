"""Rows by number from the shards of a folder.

Every block's checksum is compared at its first use, so damage is an error that names shard, block and offset;
no row is ever skipped. With a quarantine, rows of the blocks on its list are never read: they come as padding of
length 0. Shards are opened when first needed: opening a data set costs its manifest alone, whatever the number of
rows. Left out: which rows a step needs (data.stream), and remote storage.
"""

import logging
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minilm.data.errors import DamageError
from minilm.data.format.manifest import Shard, load_manifest
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.rows import I64, Batch, Counters, Rows
from minilm.data.read.shard_files import ShardFiles, damaged_blocks

log = logging.getLogger("minilm.data")


class RowReader(Rows):
    """Random access to the rows of the data set in `folder`; `pin` puts batches into page-locked memory.

    With a `quarantine`, rows of its blocks are masked, and damage that is new raises QuarantineGrew. May be used by
    several threads.
    """

    def __init__(self, folder: Path, *, pin: bool = False, quarantine: Quarantine | None = None):
        self.folder = Path(folder)
        self.manifest = manifest = load_manifest(self.folder)
        self.num_rows, self.seq_len = manifest.rows, manifest.seq_len
        self.shard_rows = manifest.rows_per_block * manifest.blocks_per_shard
        self.fingerprint, self.tokenizer = manifest.fingerprint, manifest.tokenizer
        self.pin, self.quarantine = pin, quarantine
        masked = None if quarantine is None else quarantine.masked(manifest, self.location)
        self._masked = masked if masked is not None and masked.any() else None
        self._shards = ShardFiles(self.folder, manifest, self.shard_path, masked=self._masked)
        self._lock = threading.RLock()  # nobody may close a file that another thread reads
        self._num_rows = self._num_masked = 0  # handed out

    @property
    def counters(self) -> Counters:
        row_bytes = self._num_rows * self.manifest.layout.row_bytes
        return Counters(self._num_rows, row_bytes, self._shards.num_checked, masked_rows=self._num_masked)

    @property
    def location(self) -> str:
        """The path or URL of the data set, for messages."""
        return str(self.folder)

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows with these numbers, in the order given. DataError names shard, block and offset of damage."""
        wanted = self.checked(row_ids)
        tokens = np.empty((len(wanted), self.seq_len), np.dtype(self.manifest.dtype).newbyteorder("<"))
        with self._lock:
            beside = self._gather(wanted, tokens)
            self._num_rows += len(wanted)
        ids = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=self.pin)
        np.copyto(ids.numpy(), tokens)
        mask = ends = None
        lengths = beside
        if beside is not None and self.manifest.layout.has_ends:
            ends = np.unpackbits(beside, axis=1, count=self.seq_len, bitorder="little").view(np.bool_)
            lengths = (ends * np.arange(1, self.seq_len + 1)).max(axis=1)
        if lengths is not None and (lengths < self.seq_len).any():
            mask = torch.from_numpy(np.arange(self.seq_len) < lengths[:, None])
            mask = mask.pin_memory() if self.pin else mask
        return Batch(ids, mask, torch.from_numpy(wanted), None if ends is None else torch.from_numpy(ends))

    def _gather(self, wanted: I64, tokens: npt.NDArray) -> npt.NDArray | None:
        """Read rows into `tokens` [n, seq_len]; returns what is stored beside them (`ShardFiles.gather`; 0 in
        quarantine), None if nothing is and no row is in quarantine."""
        masked = None if self._masked is None else self._masked[wanted // self.manifest.rows_per_block]
        if masked is None or not masked.any():
            return self._gather_sound(wanted, tokens)
        sound = np.empty((np.count_nonzero(~masked), self.seq_len), dtype=tokens.dtype)
        found = self._gather_sound(wanted[~masked], sound)
        tokens[~masked] = sound
        tokens[masked] = max(0, self.tokenizer.pad_id)
        layout = self.manifest.layout
        beside = np.zeros((len(wanted), *layout.lengths_shape), np.uint8 if layout.has_ends else np.int64)
        beside[~masked] = self.seq_len if found is None else found
        self._num_masked += int(np.count_nonzero(masked))
        return beside

    def _gather_sound(self, wanted: I64, tokens: npt.NDArray) -> npt.NDArray | None:
        """`_gather` for rows that are not in quarantine. A damaged shard is recovered once, if it can be."""
        recovered: set[int] = set()
        while True:
            try:
                return self._shards.gather(wanted, tokens)
            except DamageError as error:
                if error.shard in recovered:
                    raise
                recovered.add(error.shard)
                self._shards.close(error.shard)
                bad = self.recover(self.manifest.shard(error.shard), error)
                if bad and self.quarantine is not None:
                    self.quarantine.add(self.manifest, self.location, bad, str(error))
                log.warning("%s: it was read wrongly once, and is whole where it comes from", error)

    def recover(self, shard: Shard, error: DamageError) -> list[int]:
        """The blocks of a shard that are damaged at its source too; an empty list if reading it again helps.

        Raises `error` unless there is a quarantine to put them into.
        """
        if self.quarantine is None or self.quarantine.path is None:
            raise error
        return damaged_blocks(self.shard_path(shard), self.folder, self.manifest, shard)

    def shard_path(self, shard: Shard) -> Path:
        """The file of a shard."""
        return self.folder / shard.name
