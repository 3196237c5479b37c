"""A `RowReader` over a URL: the manifest is read once, shards come through the node's cache.

A full shuffle needs all shards in the cache sooner or later. With a `window`, the stream holds two windows of shards
only: the current one, and the next one, which threads fetch meanwhile. Rows, order and errors are those of the same
data set on the local disk. A cached copy that turns out damaged is dropped and fetched again. Only a shard that is
damaged or missing behind the URL can go into quarantine, and then all of its blocks do.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.errors import DamageError, DataError, OriginError
from minilm.data.format.files import write_whole
from minilm.data.format.manifest import MANIFEST, Shard, check_files, parse_manifest
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import I64, Counters
from minilm.data.storage.cache import Cache, Lease
from minilm.data.storage.remote import Store, fetch_small_files
from minilm.data.storage.retry import RetryPolicy


class RemoteReader(RowReader):
    """Rows of the data set at `url`. `fingerprint`, when given, must be that of its manifest."""

    def __init__(
        self,
        url: str,
        *,
        cache: Path,
        max_cache_bytes: int = 64 << 30,
        fingerprint: str | None = None,
        retry: RetryPolicy | None = None,
        options: dict[str, Any] | None = None,
        num_fetchers: int = 4,
        pin: bool = False,
        quarantine: Quarantine | None = None,
    ):
        self.store = Store(url, retry=retry, options=options)
        self.cache = Cache(Path(cache) / "shards", max_cache_bytes)
        self._leases: dict[int, Future[Lease]] = {}
        self._pool = ThreadPoolExecutor(num_fetchers, thread_name_prefix="minilm-fetch")
        self._hits = self._fetched_bytes = 0
        raw = self.store.read(MANIFEST)
        manifest = parse_manifest(raw, f"{self.store.url}/{MANIFEST}")
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise DataError(
                f"{self.store.url}/{MANIFEST}: the data set was replaced: its fingerprint is "
                f"{manifest.fingerprint[:16]}…, "
                f"this run began with {fingerprint[:16]}…; put the right one back or start a new run"
            )
        folder = Path(cache) / "sets" / manifest.fingerprint
        self._mirror_small_files(folder, raw, manifest.tokenizer_files)
        super().__init__(folder, pin=pin, quarantine=quarantine)

    def _mirror_small_files(self, folder: Path, manifest: bytes, pinned: dict[str, str]) -> None:
        mirrored = (folder / MANIFEST).exists() and (folder / MANIFEST).read_bytes() == manifest
        if mirrored and not check_files(folder, pinned):
            return
        fetch_small_files(self.store, folder, pinned)
        write_whole(folder / MANIFEST, manifest)

    @property
    def location(self) -> str:
        return self.store.url

    @property
    def counters(self) -> Counters:
        return super().counters._replace(
            cache_hits=self._hits, fetched_bytes=self._fetched_bytes, retries=self.store.num_retries
        )

    def enter_window(self, current: I64, coming: I64) -> None:
        """Hold the shards of the current window, fetch those of the coming one ahead, release all others."""
        with self._lock:
            keep = {int(shard) for shard in np.concatenate([current, coming])}
            for shard in [s for s in self._leases if s not in keep]:
                self._shards.close(shard)
                future = self._leases.pop(shard)
                if not future.cancel():
                    future.add_done_callback(_release)
            for shard in [*current.tolist(), *coming.tolist()]:
                if not self._all_masked(int(shard)):
                    self._fetch_ahead(int(shard))

    def _all_masked(self, number: int) -> bool:
        shard = self.manifest.shard(number)
        blocks = slice(shard.first_block, shard.first_block + shard.num_blocks)
        return self._masked is not None and bool(self._masked[blocks].all())

    def shard_path(self, shard: Shard) -> Path:
        """The cached file of a shard, once it is fetched."""
        return self._fetch_ahead(shard.number).result().path

    def _fetch_ahead(self, number: int) -> Future[Lease]:
        if number not in self._leases:
            self._leases[number] = self._pool.submit(self.take, self.manifest.shard(number))
        return self._leases[number]

    def recover(self, shard: Shard, error: DamageError) -> list[int]:
        """Drop the cached copy and fetch the shard again. All its blocks if that does not help."""
        future = self._leases.pop(shard.number)
        if (failed := future.exception()) is None:
            self.cache.drop(future.result())
            try:
                self._fetch_ahead(shard.number).result()
                return []
            except DamageError as origin:
                error = origin
        elif not isinstance(failed, DamageError):  # an error of the cache's disk: the shard may be whole
            raise failed
        if self.quarantine is None or self.quarantine.path is None:
            raise error
        return list(range(shard.first_block, shard.first_block + shard.num_blocks))

    def take(self, shard: Shard) -> Lease:
        """The cached file of a shard, fetched unless it is there. DamageError if the URL holds another one."""

        def fetch(into: Path) -> None:
            self.store.fetch(shard.name, shard.num_bytes, shard.sha256, into)

        try:
            lease = self.cache.take(shard.sha256, shard.num_bytes, fetch)
        except OriginError as error:
            raise DamageError(str(error), shard.number) from error
        self._hits += lease.hit
        self._fetched_bytes += 0 if lease.hit else shard.num_bytes
        return lease

    def close(self) -> None:
        """Release every shard and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for shard, future in self._leases.items():
            self._shards.close(shard)
            _release(future)
        self._leases.clear()


def _release(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
