"""Settings of glibc's memory allocator for a process that trains: keep what PyTorch frees, as each step needs it again.

Else large blocks go back to the kernel, and page faults get them again at the next step: 30,000 of them in a main
thread, 9,000 in another, which has an arena of its own. Keeping them takes 5 to 7 % off a step on two cores
(docs/benchmarks.md, 2026-11-23). Without glibc nothing changes.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

SETTINGS = {  # name in the environment: (number in malloc.h, value)
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # never
    "MALLOC_TOP_PAD_": (-2, 64 * 2**20),
}


def malloc_environment() -> dict[str, str]:
    """For a process that is started with it; what this process' own environment says goes before."""
    return {name: os.environ.get(name, str(value)) for name, (_, value) in SETTINGS.items()}


def keep_freed_memory() -> None:
    """The same for this process; before it starts threads, which else have arenas already."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in SETTINGS.items():
            if name not in os.environ:
                mallopt(number, value)
