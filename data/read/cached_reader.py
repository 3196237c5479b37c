"""A second reader of the rows that a `RemoteReader` of this process has brought into the node's cache.

It fetches no shard and holds none in the cache: reading a second time takes neither traffic nor room from reading the
first time. A shard that is not in the cache (any more) is `NotCached`. A cached copy that turns out damaged is dropped
and fetched again, as the first reader would do.
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
    """The rows of `first`, with its quarantine; may be used by another thread. Call `release` when done."""

    def __init__(self, first: RemoteReader):
        self._first, self._fetched = first, list[Lease]()
        super().__init__(first.folder, quarantine=first.quarantine)

    @property
    def location(self) -> str:
        return self._first.location

    def shard_path(self, shard: Shard) -> Path:
        return self._first.cache.folder / shard.sha256

    def recover(self, shard: Shard, error: DamageError) -> list[int]:
        """Fetch a damaged copy again. NotCached if there is none."""
        lease = self._first.cache.look(shard.sha256, shard.num_bytes)
        if lease is None:
            raise NotCached(str(error)) from error
        self._first.cache.drop(lease)
        self._fetched.append(self._first.take(shard))
        return []

    def release(self) -> None:
        """Hold no shard, so that those that are evicted take no room."""
        with self._lock:
            self._shards.close_all()
            while self._fetched:
                self._fetched.pop().release()
