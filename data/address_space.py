"""A reserved range of addresses into which files are mapped at places of our choice (Linux, through libc's mmap).

Mapped side by side at a fixed distance, all shards of a data set are one array, and rows of any of them are
gathered by one instruction of numpy instead of one a shard. Reserving takes no memory, only addresses (10 TB of shards
are 8 % of what a process has); a mapped file keeps no descriptor open. Touching a place where nothing is mapped
kills the process, so only data.mapped, which knows what is mapped, uses this.
"""

import ctypes
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # linux/mman.h; the module mmap lacks them
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, file, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


class AddressSpace:
    """`num_bytes` of addresses; `bytes` is a uint8 view of all of them, valid where something is mapped."""

    def __init__(self, num_bytes: int):
        self._base = _mmap(None, num_bytes, _PROT_NONE, _RESERVED, -1)
        self._release = weakref.finalize(self, _libc.munmap, self._base, num_bytes)
        window = (ctypes.c_ubyte * num_bytes).from_address(self._base)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memoryview(window).cast("B"), dtype=np.uint8)

    def map(self, file: int, at: int, num_bytes: int) -> None:
        """Map the first `num_bytes` of an open file, read-only, at `at` (a multiple of the page size)."""
        _mmap(self._base + at, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file)

    def unmap(self, at: int, num_bytes: int) -> None:
        """Back to reserved addresses."""
        _mmap(self._base + at, num_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1)
