"""Threads that give their core away while they wait for each other, where other programs want it.

OpenMP's threads meet after every operation, and whoever comes first spins. Beside a busy program it spins on the core
that the other one needs: a step of two threads on two cores takes 15 times as long (docs/benchmarks-log.md,
2026-11-29). libgomp, which PyTorch brings on Linux, spins a moment only once a process has more threads than there are
cores; idle teams make it so, and the step takes 1.7 times as long. On a free machine that would cost half as much
again, so the teams are there only while this process' threads could run and have no core.

Leaves out: other OpenMP libraries, and systems that do not tell how long threads waited. Invariant: as many threads as
before compute the same numbers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SECONDS = 1.0
# seconds that a thread waited for a core, in a second; measured with two threads: free 0.01, crowded 0.23 to 0.49
CROWDED, FREE = 0.1, 0.04
TASKS = Path("/proc/self/task")


@contextmanager
def short_waits_where_crowded(threads: int) -> Iterator[None]:
    """While open, watch this process, whose operations are computed by so many threads."""
    if threads < 2 or waited_seconds() is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(threads, ended), name="short-waits", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def waited_seconds() -> float | None:
    """How long this process' threads were ready to run and had no core, in all; None where nobody tells."""
    total = None
    with suppress(OSError):
        for task in TASKS.iterdir():
            with suppress(OSError, IndexError, ValueError):  # a thread that has just ended
                total = (total or 0.0) + int((task / "schedstat").read_text().split()[1]) / 1e9
    return total


def _watch(threads: int, ended: threading.Event) -> None:
    teams: list[IdleTeam] = []
    waited, since = waited_seconds() or 0.0, time.monotonic()
    while not ended.wait(SECONDS):
        now_waited, now = waited_seconds() or 0.0, time.monotonic()
        share = (now_waited - waited) / (now - since) / threads
        waited, since = now_waited, now
        if share > CROWDED and not teams:
            log.info("other programs want the cores: threads wait for each other without spinning")
            teams = [IdleTeam() for _ in range(max(1, (os.cpu_count() or 1) // threads))]
        elif share < FREE and teams:
            log.info("the cores are free again: threads spin while they wait for each other")
            _close(teams)
    _close(teams)


def _close(teams: list[IdleTeam]) -> None:
    while teams:
        teams.pop().close()


class IdleTeam:
    """A thread that has OpenMP threads of its own, as many as any other, and does nothing."""

    def __init__(self) -> None:
        started, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="idle-team", daemon=True)
        self._thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        torch.ones(1 << 20).add_(1)  # large enough for all threads
        started.set()
        self._ended.wait()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
