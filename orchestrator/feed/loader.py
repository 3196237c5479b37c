"""The rows of a stage as one worker takes them, and the books kept of them: ledger, masked rows, what the stream did.

Every rank has a `RowLoader`; what it `tells` is added over ranks with each step and comes back in `close_step`, so
that the books are the same on all of them. The books travel in the checkpoint (`facts`).
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
from minilm.orchestrator.feed.quarantine import QuarantineMask
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.step import MicroBatch

COUNTS = ("rows_read", "bytes_read", "shards_in_cache", "bytes_fetched", "retries")
LOCAL_COUNTS = COUNTS[:2]


class RowLoader:
    """`stream`: the batches; `expected`: reads them once more to check the ledger, on the main rank only."""

    def __init__(self, spec: StageSpec, world: World):
        self.spec = spec
        order: dict[str, Any] = {"seed": spec.seed, "batch": spec.batch, "micro_batch": spec.micro_batch}
        self.masking = QuarantineMask(spec.data)
        quarantine = self.masking.quarantine
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

    def begin(self, first: int, facts: Mapping[str, Any]) -> None:
        """Read ahead from step `first` on, with the books of the checkpoint there (`facts`; empty at the start)."""
        if facts:
            self.ledger.running = int(facts["digest"], 16)
        self.masking.restore(first, facts)
        self.batches = self.stream.iterate(first, self.spec.steps, self.mine)

    def rows_of_step(self, waiting: Callable[[], AbstractContextManager[None]]) -> Iterator[MicroBatch]:
        """This worker's micro-batches of the next step, noted; `waiting()` is entered while rows are waited for."""
        assert self.batches is not None, "begin comes first"
        for index in self.mine:
            with waiting():
                batch = next(self.batches)
            self.ledger.take(batch)
            self.masking.take(batch)
            yield index, batch.input_ids, batch.mask

    def tell(self) -> list[int]:
        """Of the step that this rank has taken: masked rows, what the stream did so far, the digest of all rows."""
        done = self.stream.counters
        counts = [done.rows, done.row_bytes, done.cache_hits, done.fetched_bytes, done.retries]
        return [self.masking.own(), *counts, *self.ledger.own()]

    def close_step(self, step: int, told: Sequence[int]) -> None:
        """`told`: `tell` of all ranks, added."""
        masked, *rest = told
        self.masking.rows += masked
        self.counts, limbs = rest[: len(COUNTS)], rest[len(COUNTS) :]
        self.ledger.close_step(step, limbs)

    def facts(self) -> dict[str, Any]:
        """For the checkpoint: all that `ledger.verify_run` needs to tell what the run should have read."""
        return {
            "digest": f"{self.ledger.running:032x}",
            "seed": self.spec.seed,
            "batch": self.spec.batch,
            "data": self.spec.data.to_values(),
            **self.masking.facts(),
        }

    def metrics(self) -> dict[str, float]:
        """What the streams of all workers did since they began, read ahead included."""
        remote = any(is_remote(corpus.place) for corpus in self.spec.data.corpora)
        shown = dict(zip(COUNTS, self.counts, strict=True))
        metrics = {f"data/{name}": float(shown[name]) for name in (COUNTS if remote else LOCAL_COUNTS)}
        return metrics | ({"data/quarantined_rows": self.masking.rows} if self.masking.quarantine else {})

    def stop(self) -> None:
        """Read ahead no more."""
        if self.batches is not None:
            self.batches.close()

    def close(self) -> None:
        """Leave no thread running and no cached shard held."""
        self.stop()
        close(self.stream.corpora)
