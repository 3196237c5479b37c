"""The stream: rows of a step are a pure function of seed and step; damage is never passed on."""

import errno
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.order.permutation import make_order
from minilm.data.read.reader import RowReader
from minilm.data.read.shard_files import ShardFiles
from minilm.data.stream import Stream, partition
from tests.data_cases import in_a_child, make_data, prefetch_threads


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("padded"), packing="document")


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def test_rows_are_read_in_the_order_asked_for(data):
    reader = RowReader(data)
    everything = reader.read(range(reader.manifest.rows)).input_ids
    assert reader.manifest.num_shards > 2 and reader.manifest.rows % reader.manifest.rows_per_block
    wanted = np.random.default_rng(1).integers(0, reader.manifest.rows, 200)
    batch = RowReader(data).read(wanted)
    assert torch.equal(batch.input_ids, everything[wanted])
    assert batch.input_ids.dtype == torch.int64 and batch.mask is None
    assert batch.row_ids.tolist() == wanted.tolist()


def test_masks_follow_the_lengths_and_are_absent_without_padding(padded):
    reader = RowReader(padded)
    batch = reader.read(range(reader.manifest.rows))
    assert batch.mask is not None and batch.mask.dtype == torch.bool
    pad = reader.manifest.tokenizer.pad_id
    assert torch.equal(batch.mask, batch.input_ids != pad)
    whole = torch.nonzero(batch.mask.all(1)).flatten()
    assert reader.read(whole.numpy()).mask is None


def test_rows_that_do_not_exist_are_refused(data):
    reader = RowReader(data)
    with pytest.raises(DataError, match=rf"row {reader.manifest.rows} does not exist; .* 0 to"):
        reader.read([0, reader.manifest.rows])
    with pytest.raises(DataError, match="row -1 does not exist"):
        reader.read([-1])


def test_a_step_reads_consecutive_run_positions(data):
    stream = Stream(data, seed=5, batch=12, micro_batch=3)
    order = make_order(load_manifest(data).rows, 5)
    for step in (0, 7, 399_999):
        rows = [stream.micro_batch(step, index).row_ids for index in range(stream.num_micro_batches)]
        assert torch.cat(rows).tolist() == order.rows(step * 12, 12).tolist()


def test_any_schedule_of_worker_counts_reads_the_same_rows_in_order(data):
    rng = random.Random(3)
    for batch, micro in ((12, 3), (50, 5), (8, 8), (7, 1)):
        seed = rng.randrange(1 << 64)
        alone = Stream(data, seed=seed, batch=batch, micro_batch=micro)
        wanted = [b.row_ids.tolist() for b in alone.iterate(0, 20, range(alone.num_micro_batches))]
        found = []
        step = 0
        while step < 20:  # worker counts change at random steps, every worker starts from nothing
            until, world = min(20, step + rng.randint(1, 6)), rng.randint(1, 9)
            parts = []
            for rank in range(world):
                stream = Stream(data, seed=seed, batch=batch, micro_batch=micro)
                mine = partition(stream.num_micro_batches, rank, world)
                rows = [b.row_ids.tolist() for b in stream.iterate(step, until, mine)]
                parts.append(
                    [rows[i : i + len(mine)] for i in range(0, len(rows), len(mine))] if mine else []
                )
            for offset in range(until - step):
                for part in parts:
                    found += part[offset] if part else []
            step = until
        assert found == wanted


def test_shares_are_contiguous_and_the_first_ranks_take_one_more():
    for count in range(0, 20):
        for world in range(1, 9):
            shares = [partition(count, rank, world) for rank in range(world)]
            assert [i for s in shares for i in s] == list(range(count))
            sizes = [len(s) for s in shares]
            assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    with pytest.raises(DataError, match="rank 2 does not exist among 2 workers"):
        partition(4, 2, 2)


def test_a_batch_larger_than_the_data_reads_several_epochs(data):
    rows = load_manifest(data).rows
    stream = Stream(data, seed=1, batch=2 * rows + 1, micro_batch=2 * rows + 1)
    ids = stream.micro_batch(0, 0).row_ids
    assert torch.equal(torch.bincount(ids[: 2 * rows]), torch.full((rows,), 2))


def test_micro_batches_must_divide_the_batch(data):
    with pytest.raises(DataError, match="batch 10 cannot be cut into micro-batches of 3 rows"):
        Stream(data, seed=1, batch=10, micro_batch=3)


def test_iterating_equals_asking_and_leaves_no_thread(data):
    stream = Stream(data, seed=2, batch=8, micro_batch=2)
    before = prefetch_threads()
    found = list(stream.iterate(3, 6, range(1, 3)))
    assert [b.row_ids.tolist() for b in found] == [
        stream.micro_batch(step, index).row_ids.tolist() for step in (3, 4, 5) for index in (1, 2)
    ]
    batches = stream.iterate(0, 10**6, range(4))
    next(batches)
    assert len(prefetch_threads() - before) == 1
    batches.close()
    assert not prefetch_threads() - before
    assert list(stream.iterate(5, 5, range(4))) == []


def test_an_error_of_the_thread_is_raised_to_the_caller(copy):
    (copy / "shard-000001.tar").unlink()
    stream = Stream(copy, seed=2, batch=64, micro_batch=64)
    with pytest.raises(
        DataError, match=r"shard '.*shard-000001\.tar', block \d+, at byte 0: the file is missing"
    ):
        list(stream.iterate(0, 10, range(1)))


def read_all(folder):
    reader = RowReader(folder)
    return reader.read(range(reader.manifest.rows))


def fields_of_a_block(manifest):
    """A byte of every kind of field of the second block of the second shard."""
    layout = manifest.layout
    begin = layout.begin_of_block(1)
    tokens = layout.tokens_at(1)
    kinds = {
        "name in the tar header": begin + 3,
        "size in the tar header": begin + 124 + 5,
        "checksum in the tar header": begin + 148,
        "magic of npy": begin + 512,
        "shape in the npy header": begin + 512 + 60,
        "padding of the npy header": tokens - 3,
        "first token": tokens,
        "last token": tokens + layout.rows_per_block * layout.row_bytes - 1,
    }
    if layout.has_lengths:
        kinds["length"] = layout.lengths_at(1, layout.rows_per_block) + 1
        kinds["tar header of the lengths"] = layout.lengths_at(1, layout.rows_per_block) - 640
    return kinds


@pytest.mark.parametrize("kind", ["data", "padded"])
def test_one_bit_flipped_in_any_field_is_an_error_that_says_where(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    manifest = load_manifest(folder)
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    block = manifest.shard(1).first_block + 1
    for name, at in fields_of_a_block(manifest).items():
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        shard.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            read_all(folder)
        begin = manifest.layout.begin_of_block(1)
        text = str(caught.value)
        assert f"shard-000001.tar', block {block}, at byte {begin}: its" in text, name
        assert f"`minilm data verify {folder}`, repair it with `minilm data repair {folder}`" in text
    damaged = bytearray(whole)
    damaged[-7] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match="the end of the archive is not zero"):
        read_all(folder)


def test_damage_is_found_by_the_batch_that_meets_it_only(copy):
    manifest = load_manifest(copy)
    shard = copy / "shard-000000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[manifest.layout.tokens_at(1) + 5] ^= 1
    shard.write_bytes(damaged)
    reader = RowReader(copy)
    reader.read(range(manifest.rows_per_block))
    with pytest.raises(DataError, match="block 1,"):
        reader.read([manifest.rows_per_block])


def test_a_zeroed_block_is_an_error(copy):
    manifest = load_manifest(copy)
    shard = copy / "shard-000000.tar"
    damaged = bytearray(shard.read_bytes())
    begin, end = manifest.layout.begin_of_block(2), manifest.layout.begin_of_block(3)
    damaged[begin:end] = bytes(end - begin)
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match="block 2, at byte"):
        read_all(copy)


def test_a_shard_cut_short_names_the_first_block_that_is_not_whole(copy):
    manifest = load_manifest(copy)
    shard = copy / "shard-000000.tar"
    whole = shard.read_bytes()
    for at, block in ((0, 0), (5000, 1), (manifest.layout.tokens_at(2) + 3, 2), (len(whole) - 1, None)):
        shard.write_bytes(whole[:at])
        with pytest.raises(DataError, match=rf"the file has {at} bytes instead of {len(whole)}") as caught:
            read_all(copy)
        last = manifest.shard(0).num_blocks - 1
        assert f"block {last if block is None else block}, at byte {at}" in str(caught.value)


def test_any_flip_of_the_manifest_or_the_checksums_is_an_error(copy):
    rng = random.Random(1)
    for name in ("manifest.json", "blocks.xxh3"):
        path = copy / name
        whole = path.read_bytes()
        for at in [*rng.sample(range(len(whole)), 60), 0, len(whole) - 2]:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            if name == "manifest.json" and at == len(whole) - 2 and load_ok(copy):
                continue
            with pytest.raises(DataError, match=r"(is damaged|format version|no data set)"):
                read_all(copy)
        path.write_bytes(whole)
    read_all(copy)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="is damaged"):
        read_all(copy)


def load_ok(folder):
    """A flip may land in white space behind the last brace; then nothing is damaged."""
    try:
        load_manifest(folder)
    except DataError:
        return False
    return True


def test_a_missing_data_set_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"holds no data set .*make one with: minilm data build"):
        Stream(tmp_path / "nothing", seed=1, batch=1, micro_batch=1)


def the_error(read):
    try:
        read()
    except DataError as error:
        return error
    return "nothing was raised"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_kills_nobody(copy, ahead):
    manifest = load_manifest(copy)
    shard = manifest.shard(1)

    def work():
        reader = RowReader(copy)
        rows = range(shard.first_row, shard.first_row + shard.num_rows)
        wanted = reader.read(rows)
        os.truncate(copy / shard.name, 4096 + 100)
        if ahead:
            stream = Stream(reader, seed=1, batch=64, micro_batch=64)
            text = the_error(lambda: list(stream.iterate(0, 20, range(1))))
        else:
            text = the_error(lambda: reader.read(rows))
        again = the_error(lambda: reader.read(rows))
        assert torch.equal(reader.read(range(5)).input_ids, RowReader(copy).read(range(5)).input_ids)
        assert len(wanted.row_ids) == shard.num_rows
        return f"{text}\n{again}"

    first, second = in_a_child(work).splitlines()
    where = rf"{shard.name}', block \d+, at byte (\d+): its bytes cannot be read \(the file ends before byte \d+\)"
    assert int(re.search(where, first)[1]) > 4196 - manifest.layout.row_bytes
    assert f"`minilm data repair {copy}`" in first
    assert f"the file has 4196 bytes instead of {shard.num_bytes}" in second


def test_a_block_cut_before_its_first_use_is_an_error(copy):
    manifest = load_manifest(copy)
    last = manifest.shard(0).num_rows - 1
    reader = RowReader(copy)
    reader.read([0])  # opens the shard, and compares its first block alone
    os.truncate(copy / manifest.shard(0).name, 8192)
    begin = manifest.layout.begin_of_block(manifest.shard(0).num_blocks - 1)
    with pytest.raises(DataError, match=rf"block {last // 7}, at byte {begin}: its bytes cannot be read"):
        reader.read([last])


@pytest.mark.parametrize("compared", [False, True])
def test_a_disk_that_fails_is_an_error_that_says_where(data, monkeypatch, compared):
    reader = RowReader(data)
    reader.read([0] if compared else [])

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    block = 0 if compared else r"\d+"  # its end is read first
    at = rf"shard-000000.tar', block {block}, at byte \d+: its bytes cannot be read \(Input/output error\); list"
    with pytest.raises(DataError, match=at):
        reader.read([0])


@pytest.mark.parametrize("kind", ["data", "padded"])
def test_few_files_are_open_at_a_time_and_none_when_the_reader_is_gone(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    manifest = load_manifest(folder)
    files = ShardFiles(folder, manifest, lambda shard: folder / shard.name, max_open=2)
    wanted = np.random.default_rng(1).integers(0, manifest.rows, 200)
    found = np.empty((200, manifest.seq_len), "<u2")
    files.gather(wanted, found)
    assert (found == RowReader(request.getfixturevalue(kind)).read(wanted).input_ids.numpy()).all()
    assert manifest.num_shards > 2 == len(open_files(folder))
    del files
    assert not open_files(folder)


def open_files(folder):
    links = Path("/proc/self/fd").iterdir()
    return [link for link in links if str(folder) in str(os.path.realpath(link))]
