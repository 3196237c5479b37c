"""Where checkpoints lie: the operations that a folder (`local_store`) and object storage (`object_store`) share.

A checkpoint is a folder of files whose name begins with its step. It exists once it has been committed, in one
operation, after all its files are there; so every checkpoint that a store lists is whole, whatever was killed when. A
store also remembers which attempt owns it, so that a run that was continued elsewhere stops saving.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from minilm.orchestrator.errors import InfrastructureError

NAME = re.compile(r"step-(\d{9})(-[0-9a-f]{8})?")
META = "checkpoint.json"
OWNER = "owner.json"


class StoreUnavailable(InfrastructureError):
    """The store still failed at the last try; a later save may succeed."""


class CheckpointStore(Protocol):
    """The checkpoints of one stage. where: the folder or URL, for messages."""

    where: str

    def names(self) -> list[str]:
        """The names of the committed checkpoints, oldest first."""
        ...

    def staged(self, step: int) -> AbstractContextManager[Path]:
        """An empty folder on this machine for the files of step `step`, removed at the end of the block."""
        ...

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        """Make the staged `folder` a checkpoint and return its name. `guard()` is called last, and may raise."""
        ...

    def opened(self, name: str) -> AbstractContextManager[Path]:
        """A folder on this machine with the files of a checkpoint, as far as they are there."""
        ...

    def read_meta(self, name: str) -> bytes:
        """A checkpoint's `checkpoint.json`. Raises `OSError` where there is none."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint. After a kill in the middle, what is left is not listed."""
        ...

    def set_aside(self, name: str) -> None:
        """Keep a damaged checkpoint for inspection, but list it no longer; the last one of each step is kept."""
        ...

    def sweep(self) -> None:
        """Remove what killed saves have left. Only the one process that writes here may call this."""
        ...

    def claim(self, attempt: str) -> None:
        """Make `attempt` the owner of the store."""
        ...

    def owner(self) -> str | None:
        """The attempt that owns the store, None before the first claim."""
        ...


def step_of(name: str) -> int:
    found = NAME.fullmatch(name)
    assert found, f"{name} is no checkpoint"
    return int(found[1])


@contextmanager
def staging_folder(folder: Path, step: int) -> Iterator[Path]:
    """A new folder under `folder`, removed after the block; after a kill, `sweep_staging_folders` removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".step-{step:09d}.{uuid.uuid4().hex}.tmp"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep_staging_folders(folder: Path) -> None:
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
