"""Settings of glibc's memory allocator for a process that trains: keep the memory that PyTorch frees.

Each step needs it again. By default large blocks go back to the kernel and return by page faults at the next step:
30,000 of them in the main thread, 9,000 in another one, which has an arena of its own. Keeping them takes 5 to 7 % off
a step on two cores (docs/benchmarks-log.md, 2026-11-23). Without glibc nothing changes.
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
    """The settings for the environment of a process to be started; those of this process' environment come first."""
    return {name: os.environ.get(name, str(value)) for name, (_, value) in SETTINGS.items()}


def keep_freed_memory() -> None:
    """Apply the settings to this process. Call it before threads start, because each of them gets an arena then."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in SETTINGS.items():
            if name not in os.environ:
                mallopt(number, value)
