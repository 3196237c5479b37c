"""Rows of step t, straight from memory-mapped shards: `RowReader` reads rows, `Stream` knows which.

The rows of micro-batch `index` of step `step` are a pure function of (seed, step, index, manifest): no
iterator state, so resuming costs nothing and any worker count sees the same batches. The micro-batch is the
unit of determinism; `share` says which of them a worker computes.
Every block's checksum is compared on its first use, so damage is an error that names shard, block and offset;
no row is ever skipped. Left out: worker processes and shared memory; one thread reads ahead.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.errors import DataError
from data.manifest import load_manifest
from data.mapped import MappedShard
from data.order import make_order

_MAX_OPEN_SHARDS = 256
_AHEAD = 4  # micro-batches read in advance


class Batch(NamedTuple):
    """`input_ids` int64 [rows, seq_len]; `mask` bool [rows, seq_len] or None without padding; `row_ids` int64
    [rows]."""

    input_ids: Tensor
    mask: Tensor | None
    row_ids: Tensor


class RowReader:
    """Random access to the rows of the data set in `folder`."""

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.verify = verify
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        self._verified: dict[int, npt.NDArray[np.bool_]] = {}

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows of these numbers, in the order given. DataError names shard, block and offset of
        damage."""
        wanted = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        manifest = self.manifest
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < manifest.rows):
            manifest.place(int(wanted.min()))
            manifest.place(int(wanted.max()))
        tokens = np.empty((len(wanted), manifest.seq_len), dtype=manifest.dtype)
        lengths = np.full(len(wanted), manifest.seq_len, dtype=np.int64)
        blocks, rows = np.divmod(wanted, manifest.rows_per_block)
        shards, blocks = np.divmod(blocks, manifest.blocks_per_shard)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            mapped = self._open(int(shard))
            if self.verify:
                mapped.verify(np.unique(blocks[here]))
            mapped.gather(blocks[here], rows[here], here, tokens, lengths)
        ids = torch.from_numpy(tokens.astype(np.int64))
        mask = None
        if (lengths < manifest.seq_len).any():
            mask = torch.from_numpy(np.arange(manifest.seq_len) < lengths[:, None])
        return Batch(ids, mask, torch.from_numpy(wanted.copy()))

    def _open(self, shard: int) -> MappedShard:
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        while len(self._shards) >= _MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)
        num_blocks = self.manifest.shard(shard).num_blocks
        verified = self._verified.setdefault(shard, np.zeros(num_blocks, dtype=bool))
        mapped = MappedShard(self.folder, self.manifest, shard, verified)
        self._shards[shard] = mapped
        return mapped


class Stream:
    """The batches of a run over the data set in `folder`, each of `batch` rows, cut into micro-batches."""

    def __init__(self, folder: Path, *, seed: int, batch: int, micro_batch: int):
        if batch < 1 or micro_batch < 1 or batch % micro_batch:
            raise DataError(
                f"batch {batch} cannot be cut into micro-batches of {micro_batch} rows; "
                "micro_batch must divide batch, and both be at least 1"
            )
        self._reader = RowReader(folder)
        self.manifest = self._reader.manifest
        self.batch, self.num_micro_batches = batch, batch // micro_batch
        self._micro_batch_rows = micro_batch
        self._order = make_order(self.manifest.rows, seed)

    def row_ids(self, step: int, index: int) -> npt.NDArray[np.int64]:
        """int64 [micro_batch]: the row numbers of micro-batch `index` of `step`, in order."""
        if step < 0 or not 0 <= index < self.num_micro_batches:
            raise DataError(
                f"micro-batch {index} of step {step} does not exist; a step has 0 to "
                f"{self.num_micro_batches - 1}"
            )
        return self._order.rows(step * self.batch + index * self._micro_batch_rows, self._micro_batch_rows)

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of optimiser step `step`: a pure function of both, the seed and the
        manifest."""
        return self._reader.read(self.row_ids(step, index))

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
