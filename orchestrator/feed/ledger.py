"""The ledger of consumed rows: which rows, with which contents, the updates of a run were made from.

A row's entry is a 128-bit xxh3 of its tokens, seeded by row number and length. A step's digest is the sum of its
rows' entries modulo 2^128: the order does not count, a row taken twice does. The running digest of a run is
`running * MULTIPLIER + digest`, so steps have an order. All ranks' entries are added with the step's other host
numbers; the running digest travels in the checkpoint and is never behind or ahead of its weights.

What should have been read is a function of (seed, step): `Expected` reads it again through a reader of its own.
At a checkpoint up to `CHECKED_STEPS` of the steps since the last one are compared, the first and the last among
them: a bounded cost, and a fault that lasts is found. Of data behind URLs those are left out whose shards have left the
node's cache: nothing is fetched twice. `verify_run` recomputes every step of a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from minilm.data.read.cached_reader import NotCached
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.rows import Batch
from minilm.data.stream import Stream
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import open_stream, release
from minilm.orchestrator.stage.data import DataSpec

log = logging.getLogger(__name__)


MODULUS = 1 << 128


MULTIPLIER = 0xDA942042E4DD58B5_9E3779B97F4A7C15  # odd


CHECKED_STEPS = 64


MAX_RECENT = 4096  # digests held between two checkpoints; beyond that every other one is forgotten


LIMB_BITS = 32


NUM_LIMBS = 128 // LIMB_BITS


def rows_digest(batch: Batch) -> int:
    """The sum of a batch's entries, modulo 2^128. Rows of any storage dtype give the same (tokens as int64)."""
    tokens = batch.input_ids.numpy()
    seq_len = tokens.shape[1]
    lengths = (
        [seq_len] * len(tokens)
        if batch.mask is None
        else np.count_nonzero(batch.mask.numpy(), axis=1).tolist()
    )
    total = 0
    for row, row_id, length in zip(tokens, batch.row_ids.tolist(), lengths, strict=True):
        total += xxhash.xxh3_128_intdigest(row.data, (row_id * (seq_len + 1) + length) % (1 << 64))
    return total % MODULUS


def to_limbs(digest: int) -> list[int]:
    """A 128-bit number as small integers that can be added over ranks; `from_limbs` takes their sums."""
    return [digest >> (LIMB_BITS * i) & ((1 << LIMB_BITS) - 1) for i in range(NUM_LIMBS)]


def from_limbs(limbs: Sequence[int]) -> int:
    return sum(limb << (LIMB_BITS * i) for i, limb in enumerate(limbs)) % MODULUS


def advance(running: int, digest: int) -> int:
    return (running * MULTIPLIER + digest) % MODULUS


@dataclass
class Ledger:
    """`running` after `step` steps; `recent`: (step, its digest) of steps since the last checkpoint."""

    running: int = 0
    recent: list[tuple[int, int]] = field(default_factory=list)
    _own: int = 0

    def take(self, batch: Batch) -> None:
        """Note a micro-batch that this rank is about to compute."""
        self._own += rows_digest(batch)

    def own(self) -> list[int]:
        """This rank's part of the step that it has just computed, to be added over ranks; begins the next one."""
        limbs = to_limbs(self._own % MODULUS)
        self._own = 0
        return limbs

    def close_step(self, step: int, limbs: Sequence[int]) -> None:
        """`limbs`: `own` of all ranks, added."""
        digest = from_limbs(limbs)
        self.running = advance(self.running, digest)
        self.recent.append((step, digest))
        if len(self.recent) > MAX_RECENT:
            del self.recent[1::2]

    def cut(self) -> list[tuple[int, int]]:
        """The steps to compare at this checkpoint; the next one begins behind them."""
        recent, self.recent = self.recent, []
        count = min(CHECKED_STEPS, len(recent))
        picked = {round(i * (len(recent) - 1) / max(1, count - 1)) for i in range(count)}
        return [recent[i] for i in sorted(picked)]


class Expected:
    """What the ledger should say, from (seed, step) and the shards as they are on disk now; of data behind URLs, as far
    as a `first` stream has brought them to the node."""

    def __init__(
        self,
        data: DataSpec,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        quarantine: Quarantine | None = None,
        first: Stream | None = None,
    ):
        self.data = data
        self.stream = open_stream(
            data, seed=seed, batch=batch, micro_batch=micro_batch, quarantine=quarantine, first=first
        )

    def digest(self, step: int) -> int:
        indices = range(self.stream.num_micro_batches)
        return sum(rows_digest(self.stream.micro_batch(step, i)) for i in indices) % MODULUS

    def check(self, steps: Sequence[tuple[int, int]]) -> None:
        """Raise `UserError` for the first of these (step, digest) that is not what should have been read."""
        left_out = 0
        try:
            for step, digest in steps:
                try:
                    self._compare(step, digest)
                except NotCached:
                    left_out += 1
        finally:
            release(self.stream)
        if left_out:
            log.info(
                "rows of %d of %d steps were not compared: their shards have left the cache; "
                "`minilm data verify-run` compares all",
                left_out,
                len(steps),
            )

    def _compare(self, step: int, digest: int) -> None:
        if (expected := self.digest(step)) != digest:
            raise UserError(
                f"the rows that step {step} was computed from are not those of the data set {self.data.places} "
                f"(digest {digest:032x}, expected {expected:032x}): a fault of memory, disk or program; nothing "
                f"was saved; run `minilm data verify` on the data set, then the same command again: it goes on "
                f"from the last checkpoint"
            )
