"""How long a request to storage behind a network is tried: with exponential back-off and jitter, each time said."""

import logging
import random
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

log = logging.getLogger("minilm.storage")

Answer = TypeVar("Answer")


class TransientError(Exception):
    """A failure that another try may cure; the text is the cause."""


class RetryPolicy(NamedTuple):
    """How long to try: `tries` of every request and of every file; waits double from `first_wait_seconds` up to
    `longest_wait_seconds`, times a random factor in 0.5 … 1; a request may take `request_seconds`."""

    tries: int = 6
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0
    request_seconds: float = 60.0

    def persist(
        self, what: str, once: Callable[[], Answer], on_retry: Callable[[], None] = lambda: None
    ) -> Answer:
        """The answer of `once()`, called again after each `TransientError`. Raises the last of them, with `what` and
        the number of tries, when patience ends; `on_retry()` is called before every wait."""
        tried = 0
        while True:
            tried += 1
            try:
                return once()
            except TransientError as stumble:
                if tried >= self.tries:
                    raise TransientError(f"{what}: {stumble} (tried {tried} times)") from stumble
                cause = str(stumble)
            wait = min(self.longest_wait_seconds, self.first_wait_seconds * 2 ** (tried - 1))
            wait *= random.uniform(0.5, 1.0)
            on_retry()
            log.warning("%s: %s; try %d in %.1f s", what, cause, tried + 1, wait)
            time.sleep(wait)
