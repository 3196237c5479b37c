"""Quarantine: damaged blocks are masked for all alike, counted, bounded by a share; everything else stays as it was."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from minilm.data.errors import DamageError, DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.open import open_corpora
from minilm.data.read.quarantine import Quarantine, QuarantineGrew
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.read.shard_files import damaged_blocks
from minilm.data.storage.retry import RetryPolicy
from minilm.data.stream import Stream
from tests.bad_server import BadServer
from tests.data_cases import make_data

QUICK = RetryPolicy(tries=2, first_wait_seconds=0.01, longest_wait_seconds=0.05, request_seconds=5.0)
OPTIONS = {"seed": 3, "batch": 12, "micro_batch": 4}


@pytest.fixture(scope="module", params=["full", "document"])
def data(request, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp(request.param), packing=request.param)


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def flip(folder: Path, block: int, tokens: bool = True) -> None:
    manifest = load_manifest(folder)
    number, inner = divmod(block, manifest.blocks_per_shard)
    at = manifest.layout.tokens_at(inner) + 3 if tokens else manifest.layout.begin_of_block(inner)
    path = folder / manifest.shard(number).name
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def reading(folder, path, *, share=1.0, steps=30):
    """All batches of a run that starts again whenever the quarantine grew; how often it did; its last stream."""
    starts = 0
    while True:
        starts += 1
        quarantine = Quarantine(path, max_quarantined_share=share)
        stream = Stream(folder, quarantine=quarantine, **OPTIONS)
        try:
            return list(stream.iterate(0, steps, range(stream.num_micro_batches))), starts, stream
        except QuarantineGrew:
            assert starts < 20


def assert_masked(found, sound, manifest, blocks):
    """Every batch as without damage, but for the rows of these blocks: padding, and nothing counts."""
    num_masked = 0
    for one, other in zip(found, sound, strict=True):
        assert torch.equal(one.row_ids, other.row_ids)
        bad = torch.isin(one.row_ids // manifest.rows_per_block, torch.tensor(sorted(blocks)))
        num_masked += int(bad.sum())
        masks = [b.input_ids >= 0 if b.mask is None else b.mask for b in (one, other)]
        assert torch.equal(one.input_ids[~bad], other.input_ids[~bad])
        assert torch.equal(masks[0][~bad], masks[1][~bad])
        assert not masks[0][bad].any() and (one.input_ids[bad] == manifest.tokenizer.pad_id).all()
        if bad.any():
            assert one.mask is not None
    return num_masked


def test_flipped_bits_mask_their_blocks_and_nothing_else(data, copy, tmp_path):
    manifest = load_manifest(data)
    last = manifest.num_blocks - 1
    flip(copy, 1)
    flip(copy, 2, tokens=False)  # in a tar header: nobody reads it, and yet it is damage
    flip(copy, last)
    sound = list(Stream(data, **OPTIONS).iterate(0, 30, range(3)))
    found, starts, stream = reading(copy, tmp_path / "q.json")
    assert 2 <= starts <= 4
    num_masked = assert_masked(found, sound, manifest, {1, 2, last})
    assert num_masked == stream.counters.masked_rows > 0
    assert stream.counters.rows == 30 * 12
    listed = Quarantine(tmp_path / "q.json", max_quarantined_share=1.0).blocks
    assert listed == {manifest.fingerprint: [1, 2, last]}


@pytest.mark.parametrize("keep", ["most", "nothing", "all but the end"])
def test_a_shard_that_is_cut_loses_the_blocks_behind_the_cut(data, copy, tmp_path, keep):
    manifest = load_manifest(data)
    shard = manifest.shard(1)
    inside = 2  # the cut lies in the shard's third block
    kept = {
        "most": manifest.layout.tokens_at(inside) + 5,
        "nothing": 0,
        "all but the end": shard.num_bytes - 1,
    }[keep]
    os.truncate(copy / shard.name, kept)
    first = {"most": inside, "nothing": 0, "all but the end": shard.num_blocks - 1}[keep]
    gone = set(range(shard.first_block + first, shard.first_block + shard.num_blocks))
    sound = list(Stream(data, **OPTIONS).iterate(0, 30, range(3)))
    found, starts, _ = reading(copy, tmp_path / "q.json")
    assert starts == 2
    assert_masked(found, sound, manifest, gone)


@pytest.mark.parametrize("what", ["missing", "longer", "end"])
def test_other_damage_of_a_file_is_masked_too(data, copy, tmp_path, what):
    manifest = load_manifest(data)
    shard = manifest.shard(0)
    path = copy / shard.name
    if what == "missing":
        path.unlink()
    elif what == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    blocks = range(shard.num_blocks) if what == "missing" else [shard.num_blocks - 1]
    sound = list(Stream(data, **OPTIONS).iterate(0, 30, range(3)))
    found, starts, _ = reading(copy, tmp_path / "q.json")
    assert starts == 2
    assert_masked(found, sound, manifest, set(blocks))


def test_a_block_on_the_list_is_masked_whatever_ones_own_copy_says(data, copy, tmp_path):
    """Two readers, one with a damaged copy and one with a sound copy, agree from the next start on."""
    flip(copy, 4)
    reading(copy, tmp_path / "q.json")
    one = Quarantine(tmp_path / "q.json", max_quarantined_share=1.0)
    other = Quarantine(tmp_path / "q.json", max_quarantined_share=1.0)
    assert one.digest == other.digest != Quarantine.of({}).digest and 0 <= one.digest < 1 << 62
    damaged, sound = (Stream(folder, quarantine=q, **OPTIONS) for folder, q in ((copy, one), (data, other)))
    for step in range(30):
        for index in range(3):
            a, b = damaged.micro_batch(step, index), sound.micro_batch(step, index)
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.row_ids, b.row_ids)
            assert (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, b.mask))
    assert damaged.counters.masked_rows == sound.counters.masked_rows > 0


def test_new_damage_is_never_skipped_by_a_running_reader(data, copy, tmp_path):
    manifest = load_manifest(data)
    reader = RowReader(copy, quarantine=Quarantine(tmp_path / "q.json", max_quarantined_share=1.0))
    flip(copy, 0)
    for _ in range(2):
        with pytest.raises(QuarantineGrew, match=r"shard-000000.tar \(1 blocks\): 7 rows .*start again"):
            reader.read([0])
    assert json.loads((tmp_path / "q.json").read_text())["blocks"] == {manifest.fingerprint: [0]}
    again = RowReader(copy, quarantine=Quarantine(tmp_path / "q.json", max_quarantined_share=1.0))
    assert not again.read([0]).mask.any()


def test_more_than_the_share_is_an_error_that_names_share_limit_shards_and_repair(data, copy, tmp_path):
    manifest = load_manifest(data)
    path, limit = tmp_path / "q.json", 7.5 / manifest.rows
    flip(copy, 0)
    reading(copy, path, share=limit)
    flip(copy, 3)
    with pytest.raises(DataError) as raised:
        reading(copy, path, share=limit)
    share = f"14 of {manifest.rows} rows ({14 / manifest.rows:.2%})"
    assert share in str(raised.value) and f"allows ({limit:.2%})" in str(raised.value)
    assert "shard-000000.tar (" in str(raised.value) and f"`minilm data repair {copy}`" in str(raised.value)
    assert "\n" not in str(raised.value)
    enough = float(
        re.search(
            r"or leave them out with max_quarantined_share: (\S+) or more; then run", str(raised.value)
        )[1]
    )
    assert reading(copy, tmp_path / "more.json", share=enough)[2].counters.masked_rows > 0
    shard = manifest.shard(3 // manifest.blocks_per_shard).name
    shutil.copyfile(data / shard, copy / shard)
    flip(
        copy, 0
    )  # the repaired set (block 0 was listed before) is read on: the find too many was not written
    reading(copy, path, share=limit)
    with pytest.raises(DataError, match="max_quarantined_share"):  # a limit that was lowered since
        RowReader(copy, quarantine=Quarantine(path, max_quarantined_share=limit / 2))


def test_without_a_quarantine_or_with_a_fixed_one_damage_stays_an_error(copy):
    manifest = load_manifest(copy)
    flip(copy, 4)
    fixed = Quarantine.of({manifest.fingerprint: [5]})
    for quarantine in (None, fixed):
        with pytest.raises(DamageError, match=r"block 4, .*checksum .*minilm data repair"):
            RowReader(copy, quarantine=quarantine).read([4 * 7])
    assert not RowReader(copy, quarantine=fixed).read([5 * 7]).mask.any()


def test_a_damaged_list_and_damaged_checksums_stay_errors(copy, tmp_path):
    path = tmp_path / "q.json"
    path.write_text("{")
    with pytest.raises(DataError, match="is not a list of quarantined blocks .*delete it"):
        Quarantine(path, max_quarantined_share=1.0)
    path.unlink()
    raw = bytearray((copy / "blocks.xxh3").read_bytes())
    raw[0] ^= 1
    (copy / "blocks.xxh3").write_bytes(raw)
    with pytest.raises(DataError, match="are not what the manifest pins"):
        reading(copy, path)


@pytest.mark.parametrize("block", [-1, 10_000])
def test_a_list_of_blocks_that_do_not_exist_is_refused(data, tmp_path, block):
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"blocks": {load_manifest(data).fingerprint: [2, block]}}))
    with pytest.raises(DataError, match=rf"lists block {block} of .*, which has blocks 0 to .*delete it"):
        RowReader(data, quarantine=Quarantine(path, max_quarantined_share=1.0))


def test_a_file_system_without_locks_is_good_enough(copy, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    flip(copy, 1)
    _, starts, stream = reading(copy, tmp_path / "q.json")
    assert starts == 2 and stream.counters.masked_rows > 0


def find(folder, path, block):
    quarantine = Quarantine(path, max_quarantined_share=1.0)
    manifest = load_manifest(folder)
    try:
        quarantine.add(manifest, str(folder), [block], "a test")
    except QuarantineGrew:
        os._exit(0)
    os._exit(1)


def test_finds_of_many_processes_at_once_are_merged(data, tmp_path):
    path = tmp_path / "deep" / "q.json"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=find, args=(data, path, block)) for block in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    found = Quarantine(path, max_quarantined_share=1.0).blocks
    assert found == {load_manifest(data).fingerprint: list(range(8))}
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == ["q.json"]


def test_each_corpus_of_a_mixture_is_masked_by_itself(data, copy, tmp_path):
    other = make_data(tmp_path / "other", documents=20, seed=5)
    flip(copy, 1)
    with pytest.raises(QuarantineGrew):
        RowReader(copy, quarantine=Quarantine(tmp_path / "q.json", max_quarantined_share=1.0)).read([7])
    quarantine = Quarantine(tmp_path / "q.json", max_quarantined_share=1.0)
    stream = Stream(open_corpora([(copy, 0.5), (other, 0.5)], quarantine=quarantine), **OPTIONS)
    manifest = load_manifest(data)
    masked = 0
    for batch in stream.iterate(0, 30, range(3)):
        bad = (batch.row_ids // manifest.rows_per_block == 1) & (batch.row_ids < manifest.rows)
        whole = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        assert torch.equal(bad, ~whole.any(1))
        masked += int(bad.sum())
    assert stream.counters.masked_rows == masked > 0


@pytest.fixture
def server(data, tmp_path):
    running = BadServer(shutil.copytree(data, tmp_path / "served"))
    yield running
    running.close()


def remote(server, tmp_path, quarantine):
    return RemoteReader(server.url, cache=tmp_path / "cache", retry=QUICK, quarantine=quarantine)


@pytest.mark.parametrize("opt_in", [False, True])
def test_a_damaged_cached_copy_is_fetched_again_and_not_quarantined(data, server, tmp_path, opt_in):
    manifest = load_manifest(data)
    quarantine = Quarantine(tmp_path / "q.json", max_quarantined_share=1.0) if opt_in else None
    remote(server, tmp_path, None).read(range(manifest.rows))
    cached = tmp_path / "cache" / "shards" / manifest.shard(1).sha256
    raw = bytearray(cached.read_bytes())
    raw[5000] ^= 1
    cached.write_bytes(raw)
    reader = remote(server, tmp_path, quarantine)
    batch, wanted = reader.read(range(manifest.rows)), RowReader(data).read(range(manifest.rows))
    assert torch.equal(batch.input_ids, wanted.input_ids)
    assert reader.counters.fetched_bytes == manifest.shard(1).num_bytes and not (tmp_path / "q.json").exists()
    reader.close()


@pytest.mark.parametrize("missing", [False, True])
def test_a_shard_damaged_behind_the_url_goes_into_quarantine_whole(data, server, tmp_path, missing):
    manifest = load_manifest(data)
    shard = manifest.shard(1)
    if missing:
        server.always[shard.name] = "404"
    else:
        flip(tmp_path / "served", shard.first_block)
    path = tmp_path / "q.json"
    reader = remote(server, tmp_path, Quarantine(path, max_quarantined_share=1.0))
    with pytest.raises(QuarantineGrew):
        reader.read([shard.first_row])
    reader.close()
    blocks = list(range(shard.first_block, shard.first_block + shard.num_blocks))
    quarantine = Quarantine(path, max_quarantined_share=1.0)
    assert quarantine.blocks == {manifest.fingerprint: blocks}
    reader = remote(server, tmp_path, quarantine)
    far = Stream(reader, window=1, **OPTIONS)
    near = Stream(data, window=1, quarantine=quarantine, **OPTIONS)
    for one, other in zip(far.iterate(0, 30, range(3)), near.iterate(0, 30, range(3)), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
    assert far.counters.masked_rows == near.counters.masked_rows > 0
    reader.close()
    with pytest.raises(DataError, match=rf"put whole copies of them at {server.url}"):
        remote(server, tmp_path, Quarantine(path, max_quarantined_share=0.0))


def test_a_server_that_is_down_quarantines_nothing(data, server, tmp_path):
    manifest = load_manifest(data)
    server.always[manifest.shard(1).name] = "500"
    reader = remote(server, tmp_path, Quarantine(tmp_path / "q.json", max_quarantined_share=1.0))
    with pytest.raises(DataError, match="tried 2 times"):
        reader.read([manifest.shard(1).first_row])
    reader.close()
    assert not (tmp_path / "q.json").exists()


def test_a_cache_that_is_gone_quarantines_nothing(data, server, tmp_path):
    """Its disk is at fault, and no shard."""
    reader = remote(server, tmp_path, Quarantine(tmp_path / "q.json", max_quarantined_share=1.0))
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(FileNotFoundError):
        reader.read([0])
    reader.close()
    assert not (tmp_path / "q.json").exists()


def test_what_was_read_wrongly_once_is_read_again(data, copy, tmp_path, monkeypatch, caplog):
    flip(copy, 0)

    def mend_and_look(path, *rest):
        shutil.copyfile(data / path.name, path)
        return damaged_blocks(path, *rest)

    monkeypatch.setattr("minilm.data.read.reader.damaged_blocks", mend_and_look)
    reader = RowReader(copy, quarantine=Quarantine(tmp_path / "q.json", max_quarantined_share=1.0))
    assert torch.equal(reader.read(range(40)).input_ids, RowReader(data).read(range(40)).input_ids)
    assert "read wrongly once" in caplog.text and not (tmp_path / "q.json").exists()
