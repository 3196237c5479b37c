"""The quarantined blocks in the loop: which blocks are masked since which step, and how many rows that were.

The list of blocks (`data.read.quarantine`) stays the same during an attempt and may be longer in the next one. A
checkpoint therefore has the history of lists; with it, `minilm data verify-run` computes the rows of every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilm.data.read.quarantine import Blocks, QuarantineGrew
from minilm.data.read.rows import Batch
from minilm.orchestrator.feed.corpora import load_quarantine
from minilm.orchestrator.stage.data import DataSpec


class QuarantineMask:
    """quarantine: None if damage stops the run. rows: the masked rows of all steps so far, on all workers."""

    def __init__(self, data: DataSpec):
        self.data = data
        self.quarantine = load_quarantine(data)
        self.history: list[tuple[int, Blocks]] = []
        self.rows = 0
        self._count = 0

    @property
    def digest(self) -> int:
        return self.quarantine.digest if self.quarantine else 0

    def check_rank_zero(self, digest: int) -> None:
        """Raises `QuarantineGrew` if rank 0 has read another list (of `digest`), which was just being written."""
        if digest != self.digest:
            raise QuarantineGrew(
                "the list of quarantined blocks grew while the workers started: they start again"
            )

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Resume at `step` from `state`, the `resume_state` of a checkpoint."""
        self.rows = int(state.get("masked_rows", 0))
        self.history = [(first, blocks) for first, blocks in state.get("quarantine", [])]
        blocks = self.quarantine.blocks if self.quarantine else {}
        if blocks != (self.history[-1][1] if self.history else {}):
            self.history.append((step, blocks))

    def resume_state(self) -> dict[str, Any]:
        """The count and the history of lists, in a checkpoint."""
        return {"masked_rows": self.rows, "quarantine": list(self.history)}

    def take(self, batch: Batch) -> None:
        """Count the masked rows of a micro-batch that this rank is about to compute."""
        if self.quarantine and batch.mask is not None:
            self._count += int((~batch.mask.any(dim=1)).sum())

    def pop_count(self) -> int:
        """This rank's masked rows of the step it has just computed; the next step starts at 0."""
        count, self._count = self._count, 0
        return count

    def grew(self) -> bool:
        """True if a worker has added damaged blocks since this attempt began, which is no failure of the attempt."""
        now = load_quarantine(self.data)
        return now is not None and now.digest != self.digest
