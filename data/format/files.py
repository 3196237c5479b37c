"""Files and folders that appear whole or not at all: temporary name, flush to the disk, rename.

A temporary is called `.NAME.<8 hex digits>.tmp` and is locked (flock) while its writer lives. That tells what a killed
writer has left from what is being written, and the next durable write into the same folder removes it. Where a file
system knows no locks, leftovers stay; they disturb nobody.
"""

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A new file, open for writing bytes, that takes the place of `path` at the end of the block.

    After an error `path` is what it was. `durable=False` leaves out flushing and the removal of leftovers. Raises
    `OSError` as the system does.
    """
    if durable:
        sweep(path.parent)
    temporary, lock = _begin(path, folder=False)
    try:
        # closed before the rename, because NFS may refuse bytes only then
        with os.fdopen(os.dup(lock), "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(lock)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    if durable:
        fsync_path(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end of the block, an older folder there being removed first.

    After an error in the block `path` is what it was.
    """
    sweep(path.parent)
    temporary, lock = _begin(path, folder=True)
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            fsync_path(entry)
        fsync_path(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    fsync_path(path.parent)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder's files and folders into `target`, which may exist. Raises `OSError` as the system does;
    `shutil.copytree` gathers errors and loses their numbers, so that a full disk is told from nothing else."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            copy_tree(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one."""
    with replacing(path, durable=durable) as file:
        file.write(content)


def is_temporary(path: Path) -> bool:
    """Is it named like something that is not whole?"""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what killed writers have left in `folder`, as far as that can be done."""
    with suppress(OSError):
        for path in filter(is_temporary, folder.iterdir()):
            with suppress(OSError):
                _remove_unlocked(path)


def fsync_path(path: Path) -> None:
    """Make the content of a file, or the names inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new temporary for `path`, and a descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        if folder:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # otherwise somebody swept it before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_unlocked(path: Path) -> None:
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # NFS locks only what may be written
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if folder else path.unlink()
    finally:
        os.close(descriptor)
