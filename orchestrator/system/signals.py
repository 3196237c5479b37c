"""SIGINT and SIGTERM ask a run to stop at the next step boundary; a second one ends it at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

HARD_EXIT = 130


class StopRequest:
    """A context in which the first signal sets `requested` and the second one ends the process.

    Install it again after `ray.init()`, which replaces handlers. Works in the main thread only, as signals do.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def install(self) -> None:
        """Install the handlers, again where something else has replaced them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(HARD_EXIT)
        self.requested = True
        text = f"\n{signal.Signals(number).name}: stopping at the next step boundary (again: at once)\n"
        with suppress(OSError):  # the terminal, or a pipe's reader, may be gone
            os.write(2, text.encode())
