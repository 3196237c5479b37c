"""What is read a second time from a node's cache: no traffic, no room, and the check of the ledger on top of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minilm.data.builder.build import build
from minilm.data.errors import DamageError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.cached_reader import CachedReader, NotCached
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.storage.cache import Cache, _entries
from minilm.data.stream import Stream
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.feed.ledger import Expected
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.worker.loop import run_stage
from tests.bad_server import BadServer
from tests.conftest import write_text
from tests.support import make_spec

WINDOW = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("original")
    text = write_text(folder / "text.txt", documents=200, seed=1)
    options = {"seq_len": 32, "held_out": 0.05, "rows_per_block": 8, "shard_bytes": 1, "processes": 1}
    build([text], str(teacher), folder / "set", **options)
    assert load_manifest(folder / "set").num_shards > 12
    return folder / "set"


@pytest.fixture
def server(original: Path, tmp_path: Path) -> Iterator[BadServer]:
    running = BadServer(shutil.copytree(original, tmp_path / "served"))
    yield running
    running.close()


@pytest.fixture
def first(server: BadServer, tmp_path: Path) -> Iterator[RemoteReader]:
    reader = RemoteReader(server.url, cache=tmp_path / "cache")
    reader.read(range(20))
    yield reader
    reader.close()


def shards(server: BadServer) -> list[str]:
    """The shards of the training part that were asked for, in order."""
    return [name for name in server.requests if name.startswith("shard-") and name.endswith(".tar")]


def open_files() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


def test_rows_are_those_of_the_first_reader_and_nothing_is_asked_for(first, server):
    before = list(server.requests)
    again = CachedReader(first)
    assert torch.equal(again.read(range(20)).input_ids, first.read(range(20)).input_ids)
    assert again.location == server.url
    with pytest.raises(NotCached, match="the file is missing"):
        again.read([30])
    assert server.requests == before


def test_released_shards_are_evicted_and_take_no_room(first):
    again = CachedReader(first)
    again.read(range(20))
    path = again.shard_path(first.manifest.shard(0))
    first.close()
    first.cache.max_bytes = 0
    assert path.name in first.cache.evict()
    assert f"{path} (deleted)" in open_files()
    again.release()
    assert f"{path} (deleted)" not in open_files()
    with pytest.raises(NotCached):
        again.read([0])


def test_a_file_that_gets_its_name_while_others_are_counted_is_counted_too(tmp_path, monkeypatch):
    cache, part = Cache(tmp_path, 6), tmp_path / f".{'b' * 64}.1.3.part"
    cache.take("a" * 64, 3, lambda into: into.write_bytes(b"abc")).release()
    part.write_bytes(b"abc")

    def meanwhile(folder):
        yield from list(_entries(folder))
        part.rename(tmp_path / ("b" * 64))

    monkeypatch.setattr("minilm.data.storage.cache._entries", meanwhile)
    assert cache.evict(room=3) == ["a" * 64]


def test_a_damaged_copy_is_fetched_again(first, server):
    again = CachedReader(first)
    path = again.shard_path(first.manifest.shard(1))
    raw = bytearray(path.read_bytes())
    raw[first.manifest.layout.tokens_at(0) + 3] ^= 1
    path.write_bytes(raw)
    wanted = RowReader(server.folder).read(range(20))
    assert torch.equal(again.read(range(20)).input_ids, wanted.input_ids)
    assert shards(server).count("shard-000001.tar") == 2
    with path.open("rb+") as file:
        file.truncate(100)
    again.release()
    with pytest.raises(NotCached, match="has 100 bytes instead of"):
        again.read([8])


def test_a_copy_damaged_here_and_where_it_comes_from_is_an_error(first, server):
    again = CachedReader(first)
    for path in (again.shard_path(first.manifest.shard(1)), server.folder / "shard-000001.tar"):
        raw = bytearray(path.read_bytes())
        raw[first.manifest.layout.tokens_at(0) + 3] ^= 1
        path.write_bytes(raw)
    with pytest.raises(DamageError, match=r"shard-000001\.tar: the object was replaced"):
        again.read([8])


def test_rows_in_quarantine_are_masked_the_second_time_too(server, tmp_path, original):
    listed = Quarantine.of({load_manifest(original).fingerprint: [1]})
    reader = RemoteReader(server.url, cache=tmp_path / "cache", quarantine=listed)
    one, other = reader.read(range(16)), CachedReader(reader).read(range(16))
    assert torch.equal(one.mask, other.mask) and not other.mask[8:].any()
    assert shards(server) == ["shard-000000.tar"]
    reader.close()


def test_files_that_are_on_their_way_count(tmp_path):
    cache, together = Cache(tmp_path, 20), threading.Barrier(2, timeout=20)

    def take(name: str, alone: bool) -> None:
        def fetch(into: Path) -> None:
            alone or together.wait()
            into.write_bytes(bytes(10))
            alone or together.wait()

        cache.take(name * 64, 10, fetch).release()

    for name in "ab":
        take(name, alone=True)
    threads = [threading.Thread(target=take, args=(name, False)) for name in "cd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name[0] for path in tmp_path.iterdir() if path.is_file()} == {"c", "d"}


def windowed(server: BadServer, tmp_path: Path, teacher: Path, spare: float = 0.0) -> StageSpec:
    """A stage over most of an epoch, with as much cache as two windows and the held-out rows need, and GB to spare."""
    sizes = [
        shard.num_bytes for part in ("", "held-out") for shard in load_manifest(server.folder / part).shards
    ]
    room = 2 * WINDOW * max(sizes) + sum(
        s.num_bytes for s in load_manifest(server.folder / "held-out").shards
    )
    cache = CacheSpec(str(tmp_path / "cache"), gigabytes=room / 1e9 + spare)
    data = describe([CorpusSpec("far", server.url)], window=WINDOW, cache=cache)
    server.requests.clear()
    steps = load_manifest(server.folder).rows // 8 - 3
    return make_spec(data, teacher, tmp_path / "stage", steps=steps, checkpoint_every_steps=5)


def test_the_check_of_the_ledger_fetches_nothing_and_keeps_the_bound_of_the_cache(
    server, teacher, tmp_path, monkeypatch
):
    spec = windowed(server, tmp_path, teacher)
    held, compared, cache = [], [], Cache(tmp_path / "cache" / "shards", 0)
    digest = Expected.digest

    def noted(self: Expected, step: int) -> int:
        found = digest(self, step)
        compared.append(step)
        return found

    def on_step(step: int) -> None:
        with cache._lock("evict.lock"):
            files = [path for path in cache.folder.iterdir() if len(path.name) == 64]
            held.append(sum(path.stat().st_size for path in files))

    monkeypatch.setattr(Expected, "digest", noted)
    assert run_stage(spec, on_step=on_step)
    asked = shards(server)
    assert len(asked) == len(set(asked)) > 10
    assert max(held) <= spec.data.cache.gigabytes * 1e9
    assert compared[-1] == spec.steps - 1, "what the cache still holds is compared"


def test_a_wrong_row_of_data_behind_a_url_stops_the_run(server, teacher, tmp_path, monkeypatch):
    original = Stream.iterate

    def iterate(self, first, steps, mine):
        for number, item in enumerate(original(self, first, steps, mine)):
            if number == 9:
                item.input_ids[1, 3] += 1
            yield item

    monkeypatch.setattr(Stream, "iterate", iterate)
    with pytest.raises(
        UserError, match="the rows that step 4 was computed from are not those of the data set"
    ):
        run_stage(windowed(server, tmp_path, teacher, spare=1.0))
