"""Ends a process that makes no step, so that a supervisor replaces it; its stacks go to the log first.

The stage's `stall_seconds` limit a step. Start-up, evaluation, export and waiting for a save may take longer.
"""

from __future__ import annotations

import faulthandler
from datetime import timedelta
from pathlib import Path

from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.train.distributed import PEER_TIMEOUT

LONG = 10  # start-up, evaluation and export may take this many times as long as a step
REARM_SECONDS = 1.0


def peer_timeout(spec: StageSpec) -> timedelta:
    """How long a worker waits for the others in a sum: as long as one of them may take before its watchdog ends it."""
    return max(PEER_TIMEOUT, timedelta(seconds=LONG * spec.runtime.stall_seconds))


class Watchdog:
    """Ends the process if `alive` is not called for `seconds`; writes the stacks of all its threads to `log` before."""

    def __init__(self, log: Path, seconds: float):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self._file = log.open("a", encoding="utf-8")
        self._rearm_timer = Timer(min(REARM_SECONDS, seconds / 4))  # a step has this much less time
        self.expect_long()

    def expect_long(self) -> None:
        """Allow `LONG` times as long until the next call."""
        self._arm(self.seconds * LONG)

    def alive(self) -> None:
        if self._rearm_timer() or self._armed != self.seconds:
            self._arm(self.seconds)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _arm(self, seconds: float) -> None:
        self._armed = seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)
