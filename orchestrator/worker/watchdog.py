"""What ends a stage instead of letting it go on wrongly or for ever, each with an error that names the rows.

Updates that are not finite; attempts that die at the same step; a process that makes no step (its stacks go to the
log, and it ends itself, so that a supervisor replaces it).
"""

from __future__ import annotations

import faulthandler
from datetime import timedelta
from pathlib import Path

from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.train.distributed import PEER_TIMEOUT

LONG = 10  # start-up, evaluation and export may take so many times as long as a step


REARM_SECONDS = 1.0


def peer_timeout(spec: StageSpec) -> timedelta:
    """How long a worker waits for the others: as long as one of them may be busy with what takes long."""
    return max(PEER_TIMEOUT, timedelta(seconds=LONG * spec.runtime.stall_seconds))


class Watchdog:
    """Ends the process, with the stacks of all its threads in `log`, when nobody has said `alive` for `seconds`."""

    def __init__(self, log: Path, seconds: float):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self._file = log.open("a", encoding="utf-8")
        self._due = Timer(min(REARM_SECONDS, seconds / 4))  # a step has so much less
        self.expect_long()

    def expect_long(self) -> None:
        """What comes now may take `LONG` times as long."""
        self._arm(self.seconds * LONG)

    def alive(self) -> None:
        if self._due() or self._armed != self.seconds:
            self._arm(self.seconds)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _arm(self, seconds: float) -> None:
        self._armed = seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)
