"""A data set behind a URL: fetched piece by piece, checked against pins, retried when the network fails.

Every request asks for a byte range and must answer with exactly that many bytes in time; what arrives must have the
sha256 that the manifest pins. A failure that may pass (5xx, reset, stall, short body, wrong bytes) is retried and
counted; what is still wrong after the last try is an error that names URL, file and cause. An object that arrives
whole and with the same wrong hash twice was replaced, which is said at once.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from minilm.data.errors import DataError, OriginError
from minilm.data.format.files import write_whole
from minilm.data.format.manifest import CHECKSUMS, TOKENIZER, check_files
from minilm.data.storage.client import ObjectClient, RefusedError
from minilm.data.storage.retry import RetryPolicy, TransientError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_PIECE_BYTES = 8 << 20


class Identity(NamedTuple):
    """What tells that a remote file was replaced, without reading it. tag: the server's hash of it, or its time."""

    num_bytes: int
    tag: str


def is_remote(given: str | Path) -> bool:
    return "://" in str(given)


class Store:
    """The files under a URL. `options` go to fsspec's file system (endpoint, credentials: never to a shell)."""

    def __init__(self, url: str, *, retry: RetryPolicy | None = None, options: dict[str, Any] | None = None):
        self._client = ObjectClient(url, retry or RetryPolicy(), **(options or {}))
        self.url = self._client.shown  # for people; requests go to `_client.url`
        self.num_retries = 0
        self._lock = Lock()

    def read(self, name: str) -> bytes:
        """A small file whole (manifest, checksums, tokenizer)."""
        return self._retried(name, lambda: self._request(name, None, None))

    def identity(self, name: str) -> Identity:
        """Size of a file, and what the server says to tell its versions apart."""

        def once() -> Identity:
            self._request(name, 0, 1)  # first, because `info` calls every failure "not found"
            try:
                info = self._client.request("info", self._client.path(name))
            except (FileNotFoundError, RefusedError, TransientError) as error:
                raise TransientError(f"the server does not say its size ({error})") from error
            tags = (
                info.get(key) for key in ("ETag", "etag", "Last-Modified", "LastModified", "updated", "mtime")
            )
            return Identity(int(info["size"]), str(next((tag for tag in tags if tag), "")))

        found = self._retried(name, once)
        assert isinstance(found, Identity)
        return found

    def open(self, name: str, identity: Identity) -> io.BufferedReader:
        """A file of known identity as a stream that is read once, front to back; every piece is retried."""
        return io.BufferedReader(_Sequential(self, name, identity), buffer_size=1 << 16)

    def sha256(self, name: str, num_bytes: int) -> str:
        """The hash of a file of known size, fetched and not kept."""
        digest = hashlib.sha256()
        for piece in self.pieces(name, num_bytes):
            digest.update(piece)
        return digest.hexdigest()

    def fetch(self, name: str, num_bytes: int, sha256: str, into: Path) -> None:
        """Fetch a file to `into`, checked: DataError unless it has the pinned size and hash."""
        found: list[str] = []

        def once() -> None:
            digest = hashlib.sha256()
            with into.open("wb") as file:
                for piece in self.pieces(name, num_bytes):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() == sha256:
                return
            found.append(digest.hexdigest())
            if found.count(found[-1]) > 1:
                raise OriginError(
                    f"{self.url}/{name}: the object was replaced: its sha256 is {found[-1][:16]}…, the manifest pins "
                    f"{sha256[:16]}…; put the right one back, or use the data set's new manifest in a new run"
                )
            raise TransientError(f"its sha256 is {found[-1][:16]}…, the manifest pins {sha256[:16]}…")

        self._retried(name, once)

    def pieces(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """The bytes of a file of known size, in order."""
        for start in range(0, num_bytes, _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, num_bytes)
            yield self._retried(name, partial(self._range, name, start, end, num_bytes))

    def _range(self, name: str, start: int, end: int, num_bytes: int) -> bytes:
        found = self._request(name, start, end)
        if len(found) == num_bytes > end - start:  # a server that knows no ranges
            found = found[start:end]
        if len(found) != end - start:
            raise TransientError(f"bytes {start} to {end} were asked for, {len(found)} came")
        return found

    def _request(self, name: str, start: int | None, end: int | None) -> bytes:
        """One request. Raises TransientError for a failure that may pass, DataError for one that will not."""
        path = f"{self.url}/{name}"
        try:
            return bytes(self._client.request("cat_file", self._client.path(name), start=start, end=end))
        except FileNotFoundError as error:
            raise OriginError(
                f"{path}: there is no such object; give the URL of a data set's folder"
            ) from error
        except RefusedError as error:
            raise DataError(f"{path}: the server refuses ({error}); check URL and credentials") from error

    def _retried(self, name: str, once: Callable[[], Any]) -> Any:
        """The answer of `once()`, tried again while it may pass. DataError with the last cause after the last try."""

        def count() -> None:
            with self._lock:
                self.num_retries += 1

        try:
            return self._client.retry.call(f"{self.url}/{name}", once, count)
        except TransientError as error:
            raise DataError(f"{error}; check the server and run the same command again") from error


class _Sequential(io.RawIOBase):
    """See `Store.open`. An object that is replaced while it is read is an error at its end, if not before."""

    def __init__(self, store: Store, name: str, identity: Identity):
        self._store, self._name, self._identity = store, name, identity
        self._pieces = store.pieces(name, identity.num_bytes)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = memoryview(next(self._pieces, b""))
            if not self._ready and self._store.identity(self._name) != self._identity:
                raise DataError(
                    f"{self._store.url}/{self._name}: the object was replaced while it was read; "
                    "run the same command again when it no longer changes"
                )
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def fetch_small_files(store: Store, into: Path, pinned: dict[str, str]) -> None:
    """Checksums and tokenizer of a data set. OriginError for a file that does not have its sha256 in `pinned`."""
    for name in (CHECKSUMS, *(pinned or [f"{TOKENIZER}/{file}" for file in TOKENIZER_FILES])):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(into / name, store.read(name))
    for name, what in check_files(into, pinned).items():
        raise OriginError(f"{store.url}/{name}: {what} in the manifest; put a whole copy there")


def split_url(url: str | Path) -> tuple[str, str]:
    """The folder of a remote file, as `Store` takes it, and the file's name in it."""
    folder, _, name = str(url).rpartition("/")
    return folder, name
