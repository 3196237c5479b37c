"""The quarantined blocks as the loop sees them: which are left out since which step, and how many rows that was.

The list is a constant of an attempt (data.quarantine). It may be longer in the next one, so a checkpoint carries the
history of lists: with it, `minilm data verify-run` can tell what every step should have been made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilm.data.read.quarantine import Blocks, QuarantineGrew
from minilm.data.read.rows import Batch
from minilm.orchestrator.feed.corpora import load_quarantine
from minilm.orchestrator.stage.data import DataSpec


class QuarantineMask:
    """`quarantine`: None where damage stops the run. `rows`: masked rows in all steps so far, of all workers."""

    def __init__(self, data: DataSpec):
        self.data = data
        self.quarantine = load_quarantine(data)
        self.history: list[tuple[int, Blocks]] = []
        self.rows = 0
        self._own = 0

    @property
    def digest(self) -> int:
        return self.quarantine.digest if self.quarantine else 0

    def check_main(self, digest: int) -> None:
        """Raises `QuarantineGrew` when the main rank has read another list, because it was being written just then."""
        if digest != self.digest:
            raise QuarantineGrew(
                "the list of quarantined blocks grew while the workers started: they start again"
            )

    def restore(self, step: int, facts: Mapping[str, Any]) -> None:
        """Go on at `step` from what a checkpoint holds (`facts`)."""
        self.rows = int(facts.get("masked_rows", 0))
        self.history = [(first, blocks) for first, blocks in facts.get("quarantine", [])]
        blocks = self.quarantine.blocks if self.quarantine else {}
        if blocks != (self.history[-1][1] if self.history else {}):
            self.history.append((step, blocks))

    def facts(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"masked_rows": self.rows, "quarantine": list(self.history)}

    def take(self, batch: Batch) -> None:
        """Note a micro-batch that this rank is about to compute."""
        if self.quarantine and batch.mask is not None:
            self._own += int((~batch.mask.any(dim=1)).sum())

    def own(self) -> int:
        """This rank's masked rows of the step that it has just computed; begins the next one."""
        own, self._own = self._own, 0
        return own

    def grew(self) -> bool:
        """Has a worker written damage down since this attempt began? Then its end is nobody's failure."""
        now = load_quarantine(self.data)
        return now is not None and now.digest != self.digest
