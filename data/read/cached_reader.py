"""Rows that a `RemoteReader` of this process has brought to the node, read a second time and fetched never.

A shard that left the cache is `NotCached`, and none is held there: what is read a second time takes neither traffic nor
room from what is read the first time. A cached copy that turns out damaged is thrown away and
fetched again, as the first reader would.
"""

from pathlib import Path

from minilm.data.errors import DamageError
from minilm.data.format.manifest import Shard
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.storage.cache import Lease


class NotCached(Exception):
    """A shard is not in the node's cache any more, or not yet. No error of the user."""


class CachedReader(RowReader):
    """The rows of `first`, with its quarantine; may be used on another thread than that. `release` when done."""

    def __init__(self, first: RemoteReader):
        self._first, self._fetched = first, list[Lease]()
        super().__init__(first.folder, quarantine=first.quarantine)

    @property
    def place(self) -> str:
        return self._first.place

    def locate(self, shard: Shard) -> Path:
        return self._first.cache.folder / shard.sha256

    def look_again(self, shard: Shard, error: DamageError) -> list[int]:
        """Fetch a damaged copy again. NotCached when there is none."""
        lease = self._first.cache.look(shard.sha256, shard.num_bytes)
        if lease is None:
            raise NotCached(str(error)) from error
        self._first.cache.drop(lease)
        self._fetched.append(self._first.take(shard))
        return []

    def release(self) -> None:
        """Hold no shard, so that those that are evicted take no room."""
        with self._lock:
            self._mapped.forget_all()
            while self._fetched:
                self._fetched.pop().release()
