"""A timer for what is done every so many seconds."""

from __future__ import annotations

import time


class Timer:
    """`timer()` is True when `seconds` have passed since it was last so, or since it was made (`at_once`: at once)."""

    def __init__(self, seconds: float, *, at_once: bool = False):
        self.seconds = seconds
        self.last = -float("inf") if at_once else time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        self.last = time.monotonic()
