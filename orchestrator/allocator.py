"""glibc's memory allocator, for a loop in the main thread."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have the process keep what PyTorch frees: it needs as much at the next step.

    Else blocks of the main thread above 32 MB go back to the kernel at once, and 30,000 page faults get them again:
    7 % of a step on two cores (docs/benchmarks.md, 2026-11-23). Other threads have arenas that keep most of it, so
    the launchers, which run the loop in one, need this not. Does nothing without glibc.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
