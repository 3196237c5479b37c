"""A reserved range of addresses into which files are mapped at places of our choice (Linux, through libc's mmap).

Mapped side by side at a fixed distance, all shards of a data set are one array, and rows of any of them are
gathered by one instruction of numpy instead of one a shard. Reserving takes no memory, only addresses (10 TB of shards
are 8 % of what a process has); a mapped file keeps no descriptor open. Touching a place where nothing is mapped
kills the process, so only data.mapped, which knows what is mapped, uses this.

Touching a page that a file lost after it was mapped (it was cut, or the disk cannot read it) raises SIGBUS, which
would kill the process too. `guard` answers it: the page becomes zeros and its address goes into `lost`, where the
reader looks after every use of the bytes. SIGBUS of anybody else's memory goes where it went before.
"""

import ctypes
import mmap
import os
import signal
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
_libc.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

_SA_SIGINFO = 4
_SI_ADDR = 16  # bytes into siginfo_t, where pointers have 8


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, file, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


class AddressSpace:
    """`num_bytes` of addresses; `bytes` is a uint8 view of all of them, valid where something is mapped."""

    def __init__(self, num_bytes: int):
        self.lost: list[int] = []  # offsets of pages that could not be read since somebody cleared this
        self._num_bytes = num_bytes
        self._base = _mmap(None, num_bytes, _PROT_NONE, _RESERVED, -1)
        _spaces.add(self)
        self._release = weakref.finalize(self, _libc.munmap, self._base, num_bytes)
        window = (ctypes.c_ubyte * num_bytes).from_address(self._base)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memoryview(window).cast("B"), dtype=np.uint8)

    def map(self, file: int, at: int, num_bytes: int) -> None:
        """Map the first `num_bytes` of an open file, read-only, at `at` (a multiple of the page size)."""
        guard()
        _mmap(self._base + at, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file)

    def unmap(self, at: int, num_bytes: int) -> None:
        """Back to reserved addresses."""
        _mmap(self._base + at, num_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1)

    def lose(self, address: int) -> bool:
        """Zeros at the page of this address, if it is one of ours."""
        at = (address - self._base) // mmap.PAGESIZE * mmap.PAGESIZE
        if not 0 <= at < self._num_bytes:
            return False
        zeros = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(self._base + at, mmap.PAGESIZE, mmap.PROT_READ, zeros, -1)
        self.lost.append(at)
        return True


_spaces: "weakref.WeakSet[AddressSpace]" = weakref.WeakSet()
_before = _SigAction()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def _on_sigbus(number: int, info: int, context: int) -> None:
    """Runs in the thread that touched the page, in the middle of a copy; on return the copy goes on."""
    address = ctypes.c_uint64.from_address(info + _SI_ADDR).value
    if not any(space.lose(address) for space in list(_spaces)):
        _libc.sigaction(number, ctypes.byref(_before), None)  # happens again, and goes where it went before


def guard() -> None:
    """Answer SIGBUS from now on; whoever answered it before is asked about other memory."""
    found = _SigAction()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(found))
    ours = ctypes.cast(_on_sigbus, ctypes.c_void_p).value
    if found.handler != ours:
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(found), ctypes.sizeof(_SigAction))
        action = _SigAction(handler=ours, flags=_SA_SIGINFO)
        _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None)
