"""Where checkpoints lie: a folder, or a URL of object storage (`object_store`), behind the same few operations.

A checkpoint is a folder of files with a name that begins with its step, and it exists when it has been committed: in
one operation, after everything in it. Whoever dies when, a name that a store lists is whole. A store also remembers
which attempt owns it, so that a run which somebody has continued elsewhere stops saving.
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
    """The store did not do what it was asked however often it was asked; later it may."""


class CheckpointStore(Protocol):
    """The checkpoints of one stage. `where` names the place to people."""

    where: str

    def names(self) -> list[str]:
        """Of the committed ones, oldest first."""
        ...

    def staged(self, step: int) -> AbstractContextManager[Path]:
        """An empty folder on this machine for the files of step `step`; removed at the end of the block."""
        ...

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        """Make what lies in the staged `folder` a checkpoint; its name. `guard()` is called last, and may raise."""
        ...

    def opened(self, name: str) -> AbstractContextManager[Path]:
        """A folder on this machine with the files of a checkpoint. What is missing is missing there too."""
        ...

    def read_meta(self, name: str) -> bytes:
        """A checkpoint's `checkpoint.json`. Raises `OSError` where there is none."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint; killed in the middle, what is left is not called one."""
        ...

    def set_aside(self, name: str) -> None:
        """Keep a damaged checkpoint to be looked at, and list it no longer; of each step the last one stays."""
        ...

    def sweep(self) -> None:
        """Remove what saves that were killed have left. For the one process that writes here."""
        ...

    def claim(self, attempt: str) -> None:
        """From now on `attempt` owns the store."""
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
    """A new folder under `folder`, removed after the block; `sweep_staging_folders` removes what a kill has left."""
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
