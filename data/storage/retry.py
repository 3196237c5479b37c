"""How long a call over a network is tried: exponential back-off with jitter, and a line in the log for each retry."""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

log = logging.getLogger("minilm.retry")

Answer = TypeVar("Answer")


class TransientError(Exception):
    """A failure that another try may cure; the text is the cause."""


class RetryPolicy(NamedTuple):
    """When to give up, and how long to wait before the next try.

    tries: of one call, None for as many as `total_seconds` allow. Waits double from `first_wait_seconds` up to
    `longest_wait_seconds`, times a random factor in 0.5 … 1. request_seconds: for one request, which whoever makes it
    has to keep. total_seconds: no try begins later than this after the first one.
    """

    tries: int | None = 6
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0
    request_seconds: float = 60.0
    total_seconds: float = math.inf

    def call(
        self, what: str, once: Callable[[], Answer], on_retry: Callable[[], None] = lambda: None
    ) -> Answer:
        """The answer of `once()`, called again after each `TransientError`; `on_retry()` is called before each wait.

        Raises `TransientError` with `what` and the number of tries when they are used up; its `__cause__` is that of
        the last try. Every other exception passes at once.
        """
        began, tried, longest = time.monotonic(), 0, self.first_wait_seconds
        while True:
            tried += 1
            try:
                return once()
            except TransientError as error:
                cause = error
            wait = min(self.longest_wait_seconds, longest) * random.uniform(0.5, 1.0)
            if tried == self.tries or time.monotonic() + wait > began + self.total_seconds:
                raise TransientError(f"{what}: {cause} (tried {tried} times)") from cause
            on_retry()
            log.warning("%s: %s; try %d in %.1f s", what, cause, tried + 1, wait)
            time.sleep(wait)
            longest = min(self.longest_wait_seconds, 2 * longest)
