"""A timer that says when something is due again."""

from __future__ import annotations

import time


class Timer:
    """True at most once in so many seconds; begins to count when it is made."""

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
