"""Loads the rows of a stage for one worker, and keeps account of them: ledger, masked rows, the stream's counters.

Every rank has a `RowLoader`. Its `extra_values` are added over ranks with each step and come back in `close_step`, so
that the account is the same on all ranks. It is saved in the checkpoint (`resume_state`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from minilm.data.read.rows import Batch
from minilm.data.storage.remote import is_remote
from minilm.data.stream import partition
from minilm.orchestrator.feed.corpora import close, open_stream
from minilm.orchestrator.feed.ledger import Expected, Ledger
from minilm.orchestrator.feed.quarantine_mask import QuarantineMask
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.step import MicroBatch

COUNTS = ("rows_read", "bytes_read", "shards_in_cache", "bytes_fetched", "retries")
LOCAL_COUNTS = COUNTS[:2]


class RowLoader:
    """stream: the batches. expected: on rank 0, reads them a second time to check the ledger; None on other ranks."""

    def __init__(self, spec: StageSpec, world: World):
        self.spec = spec
        order: dict[str, Any] = {"seed": spec.seed, "batch": spec.batch, "micro_batch": spec.micro_batch}
        self.quarantine_mask = QuarantineMask(spec.data)
        quarantine = self.quarantine_mask.quarantine
        self.stream = open_stream(spec.data, **order, pin=world.device.type == "cuda", quarantine=quarantine)
        self.expected = (
            Expected(spec.data, **order, quarantine=quarantine, first=self.stream)
            if world.is_rank_zero
            else None
        )
        self.mine = partition(self.stream.num_micro_batches, world.rank, world.size)
        self.ledger = Ledger()
        self.counts = [0] * len(COUNTS)
        self.batches: Generator[Batch, None, None] | None = None

    def begin(self, first: int, state: Mapping[str, Any]) -> None:
        """Read ahead from step `first` on. state: the checkpoint's `resume_state`; empty if the stage starts."""
        if state:
            self.ledger.running = int(state["digest"], 16)
        self.quarantine_mask.restore(first, state)
        self.batches = self.stream.iterate(first, self.spec.steps, self.mine)

    def rows_of_step(self, waiting: Callable[[], AbstractContextManager[None]]) -> Iterator[MicroBatch]:
        """This worker's micro-batches of the next step, entered in the ledger. `waiting()` wraps the wait for rows."""
        assert self.batches is not None, "begin comes first"
        for index in self.mine:
            with waiting():
                batch = next(self.batches)
            self.ledger.take(batch)
            self.quarantine_mask.take(batch)
            yield index, *batch.sequences

    def extra_values(self) -> list[int]:
        """This rank's part of the account of the step it has just computed: masked rows, the stream's counters since it
        was opened, the digest of the step's rows."""
        done = self.stream.counters
        counts = [done.rows, done.row_bytes, done.cache_hits, done.fetched_bytes, done.retries]
        return [self.quarantine_mask.pop_count(), *counts, *self.ledger.pop_limbs()]

    def close_step(self, step: int, sums: Sequence[int]) -> None:
        """Enter a computed step. sums: `extra_values` added over ranks."""
        masked, *rest = sums
        self.quarantine_mask.rows += masked
        self.counts, limbs = rest[: len(COUNTS)], rest[len(COUNTS) :]
        self.ledger.close_step(step, limbs)

    def resume_state(self) -> dict[str, Any]:
        """The account in a checkpoint, with all that `verify_run` needs to compute what the run should have read."""
        return {
            "digest": f"{self.ledger.running:032x}",
            "seed": self.spec.seed,
            "batch": self.spec.batch,
            "data": self.spec.data.to_values(),
            **self.quarantine_mask.resume_state(),
        }

    def metrics(self) -> dict[str, float]:
        """The counters of all workers' streams since they were opened, rows read ahead included."""
        remote = any(is_remote(corpus.place) for corpus in self.spec.data.corpora)
        shown = dict(zip(COUNTS, self.counts, strict=True))
        metrics = {f"data/{name}": float(shown[name]) for name in (COUNTS if remote else LOCAL_COUNTS)}
        if self.quarantine_mask.quarantine:
            metrics["data/quarantined_rows"] = self.quarantine_mask.rows
        return metrics

    def stop(self) -> None:
        """Stop reading ahead."""
        if self.batches is not None:
            self.batches.close()

    def close(self) -> None:
        """Stop reading ahead, end the threads that fetch shards and release the cached shards."""
        self.stop()
        close(self.stream.corpora)
