"""How far the task under way has come: told by sources and tasks, heard by whoever runs the task.

A source calls `tell(share)` as often as it likes; a task calls `report(counts)` now and then; the listener hears
at most five reports a second, in the task's own thread, and may raise to stop it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_SECONDS = 0.2

ProgressListener = dict[str, float]

_share = 0.0
_next = 0.0
_listener: Callable[[ProgressListener], None] | None = None


def tell(share: float) -> None:
    """The share of its unit, 0 to 1, that a source has read. Optional."""
    global _share
    _share = min(1.0, share)


def told() -> float:
    """The share that was told last."""
    return _share


def report(counts: ProgressListener) -> None:
    """Counts of the task so far; the listener gets them with the last told `share`."""
    global _next
    if _listener is not None and time.monotonic() >= _next:
        _listener({"share": _share, **counts})
        _next = time.monotonic() + EVERY_SECONDS


@contextmanager
def listening(listener: Callable[[ProgressListener], None]) -> Iterator[None]:
    """Within, a task that begins here is heard by `listener`."""
    global _listener, _share, _next
    _listener, _share, _next = listener, 0.0, time.monotonic() + EVERY_SECONDS
    try:
        yield
    finally:
        _listener = None
