"""The ledger of consumed rows: which rows, with which contents, the updates of a run were made from.

A row's entry is a 128-bit xxh3 of its tokens (and of the ends of its documents, where it holds several), seeded by row
number and length. A step's digest is the sum of its rows' entries modulo 2^128: their order does not count, a row taken
twice does. The running digest of a run is `running * MULTIPLIER + digest`, so the order of steps counts. The entries of
all ranks are added with the step's other host numbers. The running digest is saved in the checkpoint, always for the
same step as its weights.

The rows of a step are a function of (seed, step): `Expected` reads them again through a reader of its own. At a
checkpoint up to `CHECKED_STEPS` of the steps since the last one are compared, the first and the last among them: the
cost is bounded, and a fault that lasts is found. Steps whose shards have left the node's cache are not compared, so
that no shard is fetched twice. `verify_run` recomputes every step of a checkpoint.
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
    """The sum of a batch's entries, modulo 2^128. Tokens count as int64, whatever dtype stores them."""
    tokens = batch.input_ids.numpy()
    seq_len = tokens.shape[1]
    lengths = (
        [seq_len] * len(tokens)
        if batch.mask is None
        else np.count_nonzero(batch.mask.numpy(), axis=1).tolist()
    )
    content = tokens if batch.ends is None else np.where(batch.ends.numpy(), ~tokens, tokens)
    total = 0
    for row, row_id, length in zip(content, batch.row_ids.tolist(), lengths, strict=True):
        total += xxhash.xxh3_128_intdigest(row.data, (row_id * (seq_len + 1) + length) % (1 << 64))
    return total % MODULUS


def to_limbs(digest: int) -> list[int]:
    """Splits a 128-bit number into integers of 32 bits that can be added over ranks; `from_limbs` takes the sums."""
    return [digest >> (LIMB_BITS * i) & ((1 << LIMB_BITS) - 1) for i in range(NUM_LIMBS)]


def from_limbs(limbs: Sequence[int]) -> int:
    return sum(limb << (LIMB_BITS * i) for i, limb in enumerate(limbs)) % MODULUS


def advance(running: int, digest: int) -> int:
    """The running digest after one more step."""
    return (running * MULTIPLIER + digest) % MODULUS


@dataclass
class Ledger:
    """running: the digest of all steps so far. recent: (step, digest) of the steps since the last checkpoint."""

    running: int = 0
    recent: list[tuple[int, int]] = field(default_factory=list)
    _digest: int = 0

    def take(self, batch: Batch) -> None:
        """Enter a micro-batch that this rank is about to compute."""
        self._digest += rows_digest(batch)

    def pop_limbs(self) -> list[int]:
        """This rank's part of the digest of the step it has just computed; the next step starts at 0."""
        limbs = to_limbs(self._digest % MODULUS)
        self._digest = 0
        return limbs

    def close_step(self, step: int, limbs: Sequence[int]) -> None:
        """Enter a computed step. limbs: `pop_limbs` added over ranks."""
        digest = from_limbs(limbs)
        self.running = advance(self.running, digest)
        self.recent.append((step, digest))
        if len(self.recent) > MAX_RECENT:
            del self.recent[1::2]

    def pop_steps_to_check(self) -> list[tuple[int, int]]:
        """The (step, digest) to compare at this checkpoint; those of the next checkpoint come after them."""
        recent, self.recent = self.recent, []
        count = min(CHECKED_STEPS, len(recent))
        picked = {round(i * (len(recent) - 1) / max(1, count - 1)) for i in range(count)}
        return [recent[i] for i in sorted(picked)]


class Expected:
    """Computes what the ledger should hold, from (seed, step) and the shards as they are on disk now.

    first: see `open_stream`.
    """

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
        """The digest of a step's rows, on all ranks together. Raises `NotCached` as reading does (`open_stream`)."""
        indices = range(self.stream.num_micro_batches)
        return sum(rows_digest(self.stream.micro_batch(step, i)) for i in indices) % MODULUS

    def check(self, steps: Sequence[tuple[int, int]]) -> None:
        """Raises `UserError` at the first of these (step, digest) that differs from the expected one."""
        num_not_cached = 0
        try:
            for step, digest in steps:
                try:
                    self._compare(step, digest)
                except NotCached:
                    num_not_cached += 1
        finally:
            release(self.stream)
        if num_not_cached:
            log.info(
                "rows of %d of %d steps were not compared: their shards have left the cache; "
                "`minilm data verify-run` compares all",
                num_not_cached,
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
