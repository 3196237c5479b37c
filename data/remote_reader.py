"""A `RowReader` over a URL: the manifest is read once, shards come through the node's cache.

Full shuffle needs all shards in the cache sooner or later; give the stream a `window` and only two windows of shards
are held: the current one, and the next one on its way on threads. Rows, order and errors are those of the same
data set on the local disk.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import Cache, Lease
from data.errors import DataError
from data.manifest import CHECKSUMS, MANIFEST, TOKENIZER, Shard, parse_manifest
from data.reader import Counters, RowReader
from data.remote import Patience, Store

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class RemoteReader(RowReader):
    """Rows of the data set at `url`. `fingerprint`, when given, must be that of its manifest."""

    def __init__(
        self,
        url: str,
        *,
        cache: Path,
        max_cache_bytes: int = 64 << 30,
        fingerprint: str | None = None,
        patience: Patience | None = None,
        options: dict[str, Any] | None = None,
        num_fetchers: int = 4,
        pin: bool = False,
    ):
        self.store = Store(url, patience=patience, options=options)
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
        self._mirror_small_files(folder, raw)
        super().__init__(folder, pin=pin)

    def _mirror_small_files(self, folder: Path, manifest: bytes) -> None:
        if (folder / MANIFEST).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER).mkdir(exist_ok=True)
        for name in (CHECKSUMS, *(f"{TOKENIZER}/{file}" for file in TOKENIZER_FILES)):
            _write_whole(folder / name, self.store.read(name))
        _write_whole(folder / MANIFEST, manifest)

    @property
    def counters(self) -> Counters:
        return self._counters._replace(
            cache_hits=self._hits, fetched_bytes=self._fetched_bytes, retries=self.store.num_retries
        )

    def announce(self, current: np.ndarray, coming: np.ndarray) -> None:
        """Hold the shards of the current window, fetch those of the coming one ahead, let all others go."""
        with self._lock:
            keep = {int(shard) for shard in np.concatenate([current, coming])}
            for shard in [s for s in self._leases if s not in keep]:
                self.forget(shard)
                future = self._leases.pop(shard)
                if not future.cancel():
                    future.add_done_callback(_release)
            for shard in [*current.tolist(), *coming.tolist()]:
                self._fetch_ahead(int(shard))

    def locate(self, shard: Shard) -> Path:
        """The cached file of a shard, waiting for it when it is still on its way."""
        return self._fetch_ahead(shard.number).result().path

    def _fetch_ahead(self, number: int) -> Future[Lease]:
        if number not in self._leases:
            self._leases[number] = self._pool.submit(self._take, self.manifest.shard(number))
        return self._leases[number]

    def _take(self, shard: Shard) -> Lease:
        def fetch(into: Path) -> None:
            self.store.fetch(shard.name, shard.num_bytes, shard.sha256, into)

        lease = self.cache.take(shard.sha256, shard.num_bytes, fetch)
        self._hits += lease.hit
        self._fetched_bytes += 0 if lease.hit else shard.num_bytes
        return lease

    def close(self) -> None:
        """Let every shard go and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for shard, future in self._leases.items():
            self.forget(shard)
            _release(future)
        self._leases.clear()


def _release(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()


def _write_whole(path: Path, raw: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(raw)
    temporary.replace(path)
