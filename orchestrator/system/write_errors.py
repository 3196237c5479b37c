"""What it means for a worker when storage refuses a write: does it end the run, or may another attempt succeed?

A supervisor restarts a worker whatever it died of. A disk that is full, read-only or another user's would refuse the
same write again, so these errors end the run (`worker.error_file`). Errors of reading may pass, and do not end it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minilm.data.errors import DataError
from minilm.data.format.files import NO_SPACE
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import InfrastructureError, UserError


@contextmanager
def writing(folder: Path | str) -> Iterator[None]:
    """Wraps our own writes below `folder`, so that what the storage refuses ends the run.

    Raises `InfrastructureError` for an `OSError` with a number, except a full disk's, which passes as it is
    (`is_final`).
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno in NO_SPACE:
            raise
        where = error.filename2 or error.filename or folder
        raise InfrastructureError(
            f"{where} cannot be written ({error.strerror}): mend the disk, its mount or the "
            f"permissions and run the same command again, it goes on from the last checkpoint"
        ) from error


def is_final(error: BaseException) -> bool:
    """Does the error name its cause, so that a supervisor need not try again?"""
    full = isinstance(error, OSError) and error.errno in NO_SPACE
    return full or isinstance(error, UserError | DataError | ModelError)
