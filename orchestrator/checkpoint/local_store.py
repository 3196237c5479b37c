"""Checkpoints in a folder of this machine's file system: a rename commits one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from minilm.data.format.files import fsync_path
from minilm.orchestrator.checkpoint.store import META, NAME, OWNER, staging_folder, sweep_staging_folders
from minilm.orchestrator.system.files import read_json, write_json


class LocalStore:
    """Checkpoints as sub-folders of `folder`; a rename commits one, and another one withdraws it."""

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def staged(self, step: int) -> AbstractContextManager[Path]:
        return staging_folder(self.folder, step)

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        name = folder.name.split(".")[1]
        fsync_path(folder)
        guard()
        folder.rename(self.folder / name)
        fsync_path(self.folder)
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
        sweep_staging_folders(self.folder)

    def claim(self, attempt: str) -> None:
        write_json(self.folder / OWNER, {"attempt": attempt})

    def owner(self) -> str | None:
        record = read_json(self.folder / OWNER)
        return record and str(record["attempt"])
