"""A cache of files named by their sha256, shared by all processes of a node, bounded in size.

A file appears whole (temporary name, check, flush, rename) and is fetched once a node: a lock per hash makes the
others wait. A process that uses a file holds a shared lock on it, which the system drops when the process ends, however
it ends; eviction takes the least recently used files that nobody holds. The current window is therefore never evicted,
even when it is larger than the bound. fsspec's file cache and diskcache do neither, and pin nothing by its hash.

Temporaries are named here and not by `format.files`: their size is in the name, because it counts as taken.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple


class Lease(NamedTuple):
    """A cached file in use; `hit` when it was there already. Close the file to let it be evicted."""

    path: Path
    file: IO[bytes]
    hit: bool

    def release(self) -> None:
        self.file.close()


class Cache:
    """Files under `folder`, together at most `max_bytes` (plus what is in use)."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def look(self, sha256: str, num_bytes: int) -> Lease | None:
        """The file with this hash, held until released. None when it is absent, is just being evicted, or has another
        size."""
        path = self.folder / sha256
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if stat.st_nlink == 0 or stat.st_size != num_bytes:
            file.close()
            return None
        os.utime(file.fileno())  # the time of last use; by descriptor, as the name may be gone by now
        return Lease(path, file, hit=True)

    def take(self, sha256: str, num_bytes: int, fetch: Callable[[Path], None]) -> Lease:
        """The file with this hash, fetched into place by `fetch(path)` unless it is there; held until released."""
        if (lease := self.look(sha256, num_bytes)) is not None:
            return lease
        path = self.folder / sha256
        with self._lock(f"{sha256}.lock"):
            if (lease := self.look(sha256, num_bytes)) is not None:
                return lease
            self._sweep(sha256)
            temporary = self.folder / f".{sha256}.{os.getpid()}.{num_bytes}.part"
            self.evict(room=num_bytes, coming=temporary)
            try:
                fetch(temporary)
                file = temporary.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)  # before it has its name, or others might evict it at once
                os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            return Lease(path, file, hit=False)

    def drop(self, lease: Lease) -> None:
        """Remove and release a file that turned out damaged. Another one that has taken its place since stays."""
        with self._lock(f"{lease.path.name}.lock"):
            _unlink(lease.path, lease.file)
            lease.release()

    def evict(self, room: int = 0, coming: Path | None = None) -> list[str]:
        """Remove the least recently used files that nobody holds, until `room` more bytes fit; return their names.

        coming: the file that will take the room. It is created empty, so that other processes count it.
        """
        removed = []
        with self._lock("evict.lock"):
            # temporaries first: one that is renamed meanwhile is counted twice rather than missed
            parts = [int(path.name.split(".")[-2]) for path in self.folder.glob(".*.part")]
            found = list(_entries(self.folder))
            total = sum(stat.st_size for _, stat in found) + sum(parts) + room
            for path, stat in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                if self._remove_unheld(path):
                    total -= stat.st_size
                    removed.append(path.name)
            if coming is not None:
                coming.touch()
        return removed

    def _remove_unheld(self, path: Path) -> bool:
        """False where somebody holds the file, or has dropped it meanwhile."""
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return _unlink(path, file)
        except (BlockingIOError, FileNotFoundError):
            return False

    def _sweep(self, sha256: str) -> None:
        """Remove the temporaries of killed processes. The caller holds the lock for this hash, so nobody writes one."""
        for part in self.folder.glob(f".{sha256}.*.part"):
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        (self.folder / "locks").mkdir(exist_ok=True)
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _unlink(path: Path, file: IO[bytes]) -> bool:
    """Remove `path` if it still names this open file; False where it is gone or names another file."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
            path.unlink()
            return True
    return False


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The cached files, without those that are just being removed."""
    for path in folder.iterdir():
        if len(path.name) == 64 and path.is_file():
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()
