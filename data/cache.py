"""A cache of files named by their sha256, shared by all processes of a node, bounded in size.

A file appears whole (temporary name, check, flush, rename) and is fetched once a node: a lock per hash makes the
others wait. Whoever uses a file holds a shared lock on it, which the system drops when the process ends, however
it ends; eviction takes the least recently used files that nobody holds. So the current window is never evicted, even
when it is larger than the bound.
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
        """The file with this hash if it is there, held until released."""
        return self._open(self.folder / sha256, num_bytes, hit=True)

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
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            fetched = self._open(path, num_bytes, hit=False)
            assert fetched is not None, "nobody evicts a file whose lock we hold"
            return fetched

    def drop(self, lease: Lease) -> None:
        """Remove a file that turned out damaged, and let it go. Another one that has taken its place since stays."""
        with self._lock(f"{lease.path.name}.lock"):
            try:
                if os.path.samestat(lease.path.stat(), os.fstat(lease.file.fileno())):
                    lease.path.unlink()
            except FileNotFoundError:
                pass
            lease.release()

    def evict(self, room: int = 0, coming: Path | None = None) -> list[str]:
        """Remove the least recently used files that nobody holds, until `room` more bytes fit; their names.

        `coming`: the file that takes the room; it is made, empty, so that others count it until it is gone.
        """
        removed = []
        with self._lock("evict.lock"):
            found = [(path, path.stat()) for path in self.folder.iterdir() if _is_entry(path)]
            parts = [int(path.name.split(".")[-2]) for path in self.folder.glob(".*.part")]
            total = sum(stat.st_size for _, stat in found) + sum(parts) + room
            for path, stat in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                with path.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    path.unlink()
                    total -= stat.st_size
                    removed.append(path.name)
            if coming is not None:
                coming.touch()
        return removed

    def _open(self, path: Path, num_bytes: int, *, hit: bool) -> Lease | None:
        """A held file, or None when it is absent, was evicted meanwhile, or has not its size."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if stat.st_nlink == 0 or stat.st_size != num_bytes:
            file.close()
            return None
        os.utime(path)  # the time of last use
        return Lease(path, file, hit)

    def _sweep(self, sha256: str) -> None:
        """Remove parts that a killed process left behind; we hold the lock for this hash, so nobody writes them."""
        for part in self.folder.glob(f".{sha256}.*.part"):
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        (self.folder / "locks").mkdir(exist_ok=True)
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_entry(path: Path) -> bool:
    return len(path.name) == 64 and path.is_file()
