"""Positioned reads that fill their buffer or raise an error.

A file that is cut, or a disk that fails, is an `OSError` here. A memory-mapped file would end the process instead
(SIGBUS).
"""

import errno
import os

import numpy as np
import numpy.typing as npt


def buffer_of(array: npt.NDArray) -> memoryview:
    """The bytes of a contiguous array, writable."""
    return array.reshape(-1).view(np.uint8).data


def read_at(file: int, offset: int, into: memoryview) -> None:
    """Fill `into` with the bytes from `offset` on. OSError, with a `strerror`, where they cannot all be read."""
    if os.preadv(file, [into], offset) != len(into):
        raise OSError(errno.ENODATA, f"the file ends before byte {offset + len(into)}")
