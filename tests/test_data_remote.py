"""Remote data: each run equals the fault-free run, or stops with an error that names URL, file and cause."""

import fcntl
import importlib.util
import itertools
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilm.data.errors import DataError, one_line
from minilm.data.format.manifest import load_manifest
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.storage import retry
from minilm.data.storage.cache import Cache
from minilm.data.storage.remote import Store
from minilm.data.storage.retry import RetryPolicy, TransientError
from minilm.data.stream import Stream
from minilm.data.tools.verify import verify
from tests.bad_server import BadServer
from tests.data_cases import make_data, make_tokenizer

QUICK = RetryPolicy(tries=4, first_wait_seconds=0.01, longest_wait_seconds=0.05)
SHORT = QUICK._replace(request_seconds=1.0)  # where the server stalls


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("remote"), documents=80)


@pytest.fixture
def server(original, tmp_path):
    running = BadServer(shutil.copytree(original, tmp_path / "served"))
    yield running
    running.close()


@pytest.fixture
def reader(server, tmp_path):
    opened = []

    def open_it(url=None, **options):
        options = {"cache": tmp_path / "cache", "retry": QUICK, **options}
        opened.append(RemoteReader(url or server.url, **options))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


def digest(stream, steps=12):
    """All that a run consumes."""
    batches = list(stream.iterate(0, steps, range(stream.num_micro_batches)))
    return torch.cat([b.input_ids for b in batches]), torch.cat([b.row_ids for b in batches])


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIONS = {"seed": 5, "batch": 24, "micro_batch": 8}


@pytest.mark.parametrize("window", [None, 1, 2])
def test_remote_rows_equal_local_rows(original, reader, window):
    local = Stream(original, window=window, **OPTIONS)
    far = Stream(reader(), window=window, **OPTIONS)
    assert equal(digest(far), digest(local)) and far.fingerprint == local.fingerprint
    counters = far.counters
    assert counters.rows == 12 * 24 and counters.fetched_bytes > 0 and counters.retries == 0


CURABLE = ["500", "503", "429", "reset", "stall", "short", "wrong-range", "flip"]


@pytest.mark.parametrize("fault", CURABLE)
def test_a_fault_that_passes_changes_nothing(original, server, reader, fault):
    server.faults = {
        "manifest.json": ["500"],
        "shard-000000.tar": [fault],
        "shard-000002.tar": [fault, fault],
    }
    if fault == "flip":  # the same wrong hash twice is taken for a replaced object
        server.faults["shard-000002.tar"] = [fault]
    policy = SHORT._replace(tries=8) if fault == "stall" else QUICK
    far = Stream(reader(retry=policy), window=2, **OPTIONS)
    assert equal(digest(far), digest(Stream(original, window=2, **OPTIONS)))
    assert far.counters.retries >= 2  # aiohttp itself tries once again after a reset
    assert not server.faults["shard-000000.tar"] and not server.faults["shard-000002.tar"]


CAUSES = {
    "500": "500",
    "reset": "(reset|disconnected|closed)",
    "stall": "no answer within 1 s",
    "short": "(not enough|payload|came)",
    "wrong-range": "bytes 0 to .* were asked for",
    "flip": "the object was replaced",
    "404": "there is no such object",
    "403": "the server refuses",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_a_fault_that_stays_is_an_error_with_url_shard_and_cause(server, reader, fault):
    server.always["shard-000001.tar"] = fault
    policy = SHORT if fault == "stall" else QUICK
    far = Stream(reader(retry=policy._replace(tries=2)), **OPTIONS)
    with pytest.raises(DataError, match=rf"(?is){server.url}/shard-000001\.tar: .*{CAUSES[fault]}") as caught:
        digest(far)
    assert "\n" not in str(caught.value)


def test_a_changed_object_is_an_error_at_once(server, reader):
    path = server.folder / "shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        DataError, match=r"shard-000001\.tar: the object was replaced: its sha256 is \w+…, the manifest"
    ):
        digest(Stream(reader(), **OPTIONS))
    assert server.requests.count("shard-000001.tar") == 2


def test_a_changed_manifest_is_an_error(server, reader, tmp_path):
    first = reader().fingerprint
    other = make_data(tmp_path / "other", documents=30)
    shutil.copy(other / "manifest.json", server.folder / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json: the data set was replaced: its fingerprint is"):
        reader(fingerprint=first)
    (server.folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json' is damaged"):
        reader()


def test_a_server_without_ranges_is_good_enough(original, server, reader):
    server.always = {f"shard-{i:06d}.tar": "no-range" for i in range(load_manifest(original).num_shards)}
    assert equal(digest(Stream(reader(), **OPTIONS)), digest(Stream(original, **OPTIONS)))


def test_random_faults_everywhere(original, server, reader, tmp_path):
    rng = random.Random(3)
    wanted = digest(Stream(original, window=1, **OPTIONS))
    names = [path.name for path in server.folder.iterdir() if path.is_file()]
    for round_number in range(4):
        kinds = ["500", "reset", "short", "wrong-range", "no-range"]
        server.faults = {name: rng.choices(kinds, k=rng.randint(0, 3)) for name in names}
        far = Stream(reader(cache=tmp_path / f"cache{round_number}"), window=1, **OPTIONS)
        assert equal(digest(far), wanted)


def test_a_second_reader_on_the_node_fetches_nothing(original, server, reader):
    first = Stream(reader(), **OPTIONS)
    digest(first)
    shards = [name for name in server.requests if name.endswith(".tar")]
    again = Stream(reader(), **OPTIONS)
    assert equal(digest(again), digest(Stream(original, **OPTIONS)))
    assert [name for name in server.requests if name.endswith(".tar")] == shards
    assert (
        again.counters.fetched_bytes == 0 and again.counters.cache_hits == load_manifest(original).num_shards
    )


def test_only_two_windows_are_held_and_the_bound_is_kept(original, server, reader, tmp_path):
    size = load_manifest(original).shard(0).num_bytes
    far = Stream(reader(max_cache_bytes=2 * size), window=1, **OPTIONS)
    assert load_manifest(original).num_shards > 4
    most = 0
    for step in range(30):
        for index in range(far.num_micro_batches):
            far.micro_batch(step, index)
            held = [p for p in (tmp_path / "cache" / "shards").iterdir() if len(p.name) == 64]
            most = max(most, len(held))
    assert most <= 5  # two windows, and what is let go while the next is on its way
    names = [name for name in server.requests if name.endswith(".tar")]
    assert len(names) > load_manifest(original).num_shards  # evicted ones came again


def test_the_next_window_is_fetched_ahead(original, server, reader):
    far = Stream(reader(), window=1, **OPTIONS)
    far.micro_batch(0, 0)
    deadline = time.monotonic() + 240
    while len({n for n in server.requests if n.endswith(".tar")}) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    order = far._orders[0]
    wanted = {f"shard-{int(s):06d}.tar" for n in (0, 1) for s in order.shards_of(0, n)}
    assert {n for n in server.requests if n.endswith(".tar")} == wanted


def take_one(folder, log, barrier):
    cache = Cache(folder, 10**6)
    barrier.wait()

    def fetch(into):
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.1)
        into.write_bytes(b"x" * 100)

    lease = cache.take("a" * 64, 100, fetch)
    assert lease.path.read_bytes() == b"x" * 100
    lease.release()


def test_processes_of_a_node_fetch_a_file_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (tmp_path / "cache", tmp_path / "log", barrier)
    processes = [context.Process(target=take_one, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_the_cache_evicts_the_least_recently_used_that_nobody_holds(tmp_path):
    cache, times = Cache(tmp_path, 250), itertools.count()

    def take(letter):
        lease = cache.take(letter * 64, 100, lambda into: into.write_bytes(letter.encode() * 100))
        os.utime(lease.path, ns=(0, next(times)))  # the clock of a file system stands still for milliseconds
        return lease

    held = take("a")
    take("b").release()
    take("c").release()
    assert {p.name[0] for p in tmp_path.iterdir() if p.is_file()} == {"a", "c"}
    take("d").release()
    held.release()
    take("e").release()
    assert {p.name[0] for p in tmp_path.iterdir() if p.is_file()} == {"d", "e"}


def test_a_file_that_has_just_come_is_held_before_others_can_evict_it(tmp_path, monkeypatch):
    cache, replace = Cache(tmp_path, 0), Path.replace

    def replace_and_evict(self, target):
        found = replace(self, target)
        assert cache.evict() == []
        return found

    monkeypatch.setattr(Path, "replace", replace_and_evict)
    lease = cache.take("a" * 64, 3, lambda into: into.write_bytes(b"abc"))
    assert lease.path.read_bytes() == b"abc" and not lease.hit
    lease.release()
    assert cache.evict() == ["a" * 64]


@pytest.mark.parametrize(("module", "moment"), [(os, "fstat"), (fcntl, "flock")])
def test_a_copy_that_is_dropped_meanwhile_disturbs_nobody(tmp_path, monkeypatch, module, moment):
    """While it is looked for, and while another one is evicted before it."""
    cache, original = Cache(tmp_path, 6), getattr(module, moment)
    for letter in "ab":
        cache.take(letter * 64, 3, lambda into: into.write_bytes(b"abc")).release()
    cache.max_bytes = 0

    def drop_and_go_on(file, *how):
        found = original(file, *how)
        if how != (fcntl.LOCK_EX,):  # of the lock around all evictions
            (tmp_path / ("b" * 64)).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(module, moment, drop_and_go_on)
    if moment == "fstat":
        cache.look("b" * 64, 3).release()
    else:
        assert cache.evict() == ["a" * 64]


def test_a_copy_that_has_come_in_place_of_a_dropped_one_is_not_evicted_for_it(tmp_path, monkeypatch):
    cache, lock = Cache(tmp_path, 3), fcntl.flock
    path = tmp_path / ("a" * 64)
    cache.take(path.name, 3, lambda into: into.write_bytes(b"abc")).release()
    cache.max_bytes = 0

    def come_again(file, how):
        if how & fcntl.LOCK_NB:
            path.with_suffix(".new").write_bytes(b"new")
            path.with_suffix(".new").replace(path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", come_again)
    assert cache.evict() == [] and path.read_bytes() == b"new"


def test_a_fetch_that_fails_or_is_killed_leaves_nothing_behind(tmp_path):
    cache = Cache(tmp_path, 1000)

    def failing(into):
        into.write_bytes(b"half")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        cache.take("a" * 64, 100, failing)
    (tmp_path / f".{'a' * 64}.999.part").write_bytes(b"left by a killed process")
    cache.take("a" * 64, 3, lambda into: into.write_bytes(b"abc")).release()
    assert {p.name for p in tmp_path.iterdir()} == {"a" * 64, "locks"}


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "ftp://x/y", "simplecache::http://x/y", "/a/folder", "s3://", "memory://x", "ssh://h/x"],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(
        DataError, match=r"cannot be read from; allowed are URLs of file://, http://, https://, s3://"
    ):
        Store(url)


def test_file_urls(original, reader):
    assert equal(digest(Stream(reader(f"file://{original}"), **OPTIONS)), digest(Stream(original, **OPTIONS)))


def test_waits_grow_with_jitter_and_have_a_bound(server, monkeypatch):
    waits = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: 0.0))
    server.always["manifest.json"] = "500"
    growing = RetryPolicy(tries=7, first_wait_seconds=1, longest_wait_seconds=10)
    with pytest.raises(
        DataError, match=r"manifest\.json: 500.*\(tried 7 times\); check the server and run the same"
    ):
        Store(server.url, retry=growing).read("manifest.json")
    for wait, longest in zip(waits, (1, 2, 4, 8, 10, 10), strict=True):
        assert longest / 2 <= wait <= longest


def test_no_try_begins_after_the_total_time(monkeypatch):
    clock, tries = [0.0], []

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))

    def once():
        tries.append(clock[0])
        raise TransientError("away")

    with pytest.raises(TransientError, match=r"^it: away \(tried \d+ times\)$") as caught:
        RetryPolicy(tries=None, longest_wait_seconds=4.0, total_seconds=60.0).call("it", once)
    assert 56 < tries[-1] <= 60 and len(tries) > 15 and str(caught.value.__cause__) == "away"
    tries.clear()
    with pytest.raises(TransientError, match="tried 1 times"):
        RetryPolicy(tries=None, total_seconds=0.0).call("it", once)


def test_the_password_of_an_address_is_never_said(server, caplog):
    url = server.url.replace("http://", "http://user:s3cret@")
    server.always = {"manifest.json": "500", "shard-000000.tar": "403", "away": "404"}
    for name in ("manifest.json", "shard-000000.tar", "away"):
        with pytest.raises(DataError, match=f"^{server.url}/{name}: ") as caught:
            Store(url, retry=QUICK).read(name)
        assert "s3cret" not in str(caught.value)
    assert "; try 2 in" in caplog.text and "s3cret" not in caplog.text
    with pytest.raises(DataError, match="^'ftp://host/x' cannot be read from"):
        Store("ftp://user:s3cret@host/x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\n lines ", "two lines"),
        ("", "ValueError"),
        ("é" * 30, "é" * 20 + "…"),
        ("http://u:p@h/x", "http://h/x"),
    ],
)
def test_an_error_becomes_one_short_line(text, expected):
    assert one_line(ValueError(text), 20) == expected


def test_verify_reads_a_url(server):
    assert verify(server.url).whole
    path = server.folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NUMPI", 1))
    (server.folder / "shard-000003.tar").unlink()
    report = verify(server.url)
    assert [damage.file for damage in report.damage] == ["shard-000001.tar", "shard-000003.tar"]
    assert "there is no such object" in report.text() and "put a whole copy there" in report.text()


def test_verify_of_a_url_reads_everything_that_a_reader_would(tmp_path):
    server = BadServer(make_data(tmp_path, documents=80, held_out=0.3))
    whole = verify(server.url)
    assert whole.whole and whole.shards == verify(server.folder).shards
    for name, at in (("held-out/shard-000000.tar", 5000), ("blocks.xxh3", 9), ("held-out/blocks.xxh3", 1)):
        raw = bytearray((server.folder / name).read_bytes())
        raw[at] ^= 1
        (server.folder / name).write_bytes(raw)
    make_tokenizer(server.folder / "held-out" / "tokenizer", extra_tokens=1)
    told = {damage.file: damage.what for damage in verify(server.url).damage}
    (server.folder / "tokenizer" / "tokenizer.json").unlink()
    less = verify(server.url)
    server.close()
    assert told.keys() == {
        "blocks.xxh3",
        "held-out/blocks.xxh3",
        "held-out/tokenizer/tokenizer.json",
        "held-out/tokenizer/tokenizer_config.json",
        "held-out/shard-000000.tar",
    }
    assert told["blocks.xxh3"] == "its entries of shard-000000.tar are not what the manifest pins"
    assert told["held-out/tokenizer/tokenizer.json"] == "its bytes do not have the pinned sha256"
    assert f"{server.url}/tokenizer/tokenizer.json: there is no such object" in less.text()


@pytest.mark.skipif(
    importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None,
    reason="moto and s3fs are not installed",
)
def test_an_s3_endpoint_on_loopback(original, reader, tmp_path):
    import s3fs

    from tests.s3_server import S3Server

    server = S3Server()
    options = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "eu-west-1"}}
    options["endpoint_url"] = server.environment["AWS_ENDPOINT_URL"]
    system = s3fs.S3FileSystem(**options)
    system.put(f"{original}/", "bucket/set/", recursive=True)
    far = Stream(reader("s3://bucket/set", options=options), window=2, **OPTIONS)
    assert equal(digest(far), digest(Stream(original, window=2, **OPTIONS)))
    bad = bytearray((original / "shard-000001.tar").read_bytes())
    bad[5000] ^= 1
    system.pipe("bucket/set/shard-000001.tar", bytes(bad))
    system.rm("bucket/set/shard-000002.tar")
    changed = reader("s3://bucket/set", options=options, cache=tmp_path / "other")
    with pytest.raises(DataError, match=r"s3://bucket/set/shard-000001\.tar: the object was replaced"):
        changed.read([changed.shard_rows])
    with pytest.raises(DataError, match=r"s3://bucket/set/shard-000002\.tar: there is no such object"):
        changed.read([2 * changed.shard_rows])
    server.close()
