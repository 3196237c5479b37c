"""Settings of glibc's memory allocator for a process that trains: keep what PyTorch frees, as each step needs it again.

Else large blocks go back to the kernel, and page faults get them again at the next step: 30,000 of them in a main
thread. Threads have arenas of their own, which keep more of it, and are slower for another reason than faults.
Together 5 to 7 % of a step on two cores (docs/benchmarks.md, 2026-11-23). Without glibc nothing changes.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

MALLOC_ENVIRONMENT = {  # for a process that is started with it
    "MALLOC_ARENA_MAX": str(1),
    "MALLOC_MMAP_MAX_": str(0),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
MALLOC_H = {
    "MALLOC_ARENA_MAX": -8,
    "MALLOC_MMAP_MAX_": -4,
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_TOP_PAD_": -2,
}


def keep_freed_memory() -> None:
    """The same for this process and the threads that it starts from now on."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in MALLOC_ENVIRONMENT.items():
            mallopt(MALLOC_H[name], int(value))
