"""What it means when storage refuses a write, for a worker: full, not to be written, or an error of somebody else.

A supervisor starts a worker again whatever it died of. A disk that is full, read-only or another user's would refuse
the same write again, so these errors end the run (`reporting`); errors of reading may pass, and do not.
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
    """Around our own writes below `folder`: what the storage refuses would be refused again, so it ends the run.

    Raises `InfrastructureError` for an `OSError` with a number. A full disk's is left as it is (`is_final`).
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
    """Is this an error that names its cause and that a supervisor need not try again?"""
    full = isinstance(error, OSError) and error.errno in NO_SPACE
    return full or isinstance(error, UserError | DataError | ModelError)
