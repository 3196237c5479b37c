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

from orchestrator.errors import InfrastructureError
from orchestrator.files import fsync_folder, read_json, write_json

NAME = re.compile(r"step-(\d{9})(-[0-9a-f]{8})?")
META = "checkpoint.json"
OWNER = "owner.json"
CHECKPOINT_SCHEMES = ("s3", "gs")


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


def open_store(place: str | None, folder: Path) -> CheckpointStore:
    """The store at `place`, a URL or a folder; at None it is `folder`, which otherwise serves as room to work in.

    Raises `UserError` where the package for the URL is not installed.
    """
    scheme, _, path = (place or "").partition("://")
    if scheme in CHECKPOINT_SCHEMES:
        from orchestrator.object_store import ObjectStore

        return ObjectStore(str(place), folder)
    return LocalFolder(Path(path or scheme or folder))


def step_of(name: str) -> int:
    found = NAME.fullmatch(name)
    assert found, f"{name} is no checkpoint"
    return int(found[1])


@contextmanager
def room(folder: Path, step: int) -> Iterator[Path]:
    """A new folder under `folder`, gone after the block if it is still there; `sweep_rooms` knows it for a leftover."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".step-{step:09d}.{uuid.uuid4().hex}.tmp"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep_rooms(folder: Path) -> None:
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


class LocalFolder:
    """Checkpoints as sub-folders; a rename commits them and un-commits them."""

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def staged(self, step: int) -> AbstractContextManager[Path]:
        return room(self.folder, step)

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        name = folder.name.split(".")[1]
        fsync_folder(folder)
        guard()
        folder.rename(self.folder / name)
        fsync_folder(self.folder)
        return name

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        yield self.folder / name

    def read_meta(self, name: str) -> bytes:
        return (self.folder / name / META).read_bytes()

    def remove(self, name: str) -> None:
        leftover = self.folder / f".{name}.old.tmp"
        (self.folder / name).rename(leftover)
        shutil.rmtree(leftover)

    def set_aside(self, name: str) -> None:
        aside = self.folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / name).rename(aside)

    def sweep(self) -> None:
        sweep_rooms(self.folder)

    def claim(self, attempt: str) -> None:
        write_json(self.folder / OWNER, {"attempt": attempt})

    def owner(self) -> str | None:
        record = read_json(self.folder / OWNER)
        return record and str(record["attempt"])
