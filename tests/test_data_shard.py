"""Shards: plain USTAR, deterministic, addresses in closed form, readable by tar, numpy and webdataset."""

import io
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
import xxhash

from minilm.data.format.shard import ALIGNMENT, Layout, blocks_for, write_shard


def blocks_of(layout, num_blocks, rows_of_last, seed=0):
    rng = np.random.default_rng(seed)
    for block in range(num_blocks):
        rows = rows_of_last if block == num_blocks - 1 else layout.rows_per_block
        tokens = rng.integers(0, 60000, (rows, layout.seq_len)).astype(layout.dtype)
        lengths = rng.integers(
            3, 256 if layout.has_ends else layout.seq_len + 1, (rows, *layout.lengths_shape)
        )
        lengths = lengths if layout.has_lengths else None
        yield tokens, lengths


@pytest.fixture(
    params=[
        (16, "uint16", 7, False),
        (128, "uint32", 33, True),
        (2050, "uint16", 3, True),
        (130, "uint16", 33, True, True),
    ]
)
def layout(request):
    seq_len, dtype, rows, *beside = request.param
    return Layout(seq_len, dtype, rows, 5, *beside)


def beside(layout):
    return "ends.npy" if layout.has_ends else "lengths.npy"


def test_addresses_are_where_the_tar_says(tmp_path, layout):
    path = tmp_path / "shard.tar"
    blocks = list(blocks_of(layout, 5, 2))
    written = write_shard(path, layout, 40, blocks)
    raw = path.read_bytes()
    assert len(raw) == written.num_bytes == layout.shard_bytes(5, 2)
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    for number, (tokens, lengths) in enumerate(blocks):
        at = layout.tokens_at(number)
        assert at % ALIGNMENT == 0
        assert raw[at : at + tokens.nbytes] == tokens.tobytes()
        member = members.pop(f"{40 + number:09d}.tokens.npy")
        assert member.offset == layout.begin_of_block(number)
        assert member.offset_data + member.size == at + tokens.nbytes
        if lengths is not None:
            at = layout.lengths_at(number, len(tokens))
            stored = np.frombuffer(raw, layout.lengths_dtype, lengths.size, at)
            assert np.array_equal(stored, lengths.ravel())
            del members[f"{40 + number:09d}.{beside(layout)}"]
        begin, end = layout.begin_of_block(number), layout.end_of_block(number, len(tokens))
        assert xxhash.xxh3_64_intdigest(raw[begin:end]) == written.block_checksums[number]
    assert not members


def test_blocks_cover_the_file_without_gap(layout):
    ends = [layout.end_of_block(block, layout.rows_per_block) for block in range(5)]
    assert [layout.begin_of_block(block) for block in range(5)] == [0, *ends[:-1]]
    assert layout.shard_bytes(5, layout.rows_per_block) == ends[-1] + 1024


def test_tar_and_webdataset_read_every_block(tmp_path, layout):
    path = tmp_path / "shard.tar"
    blocks = list(blocks_of(layout, 3, 1))
    write_shard(path, layout, 0, blocks)
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert len(listed.stdout.split()) == (6 if layout.has_lengths else 3)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(3)]
    for sample, (tokens, lengths) in zip(samples, blocks, strict=True):
        assert np.array_equal(sample["tokens.npy"], tokens) and sample["tokens.npy"].dtype == tokens.dtype
        if lengths is not None:
            assert np.array_equal(sample[beside(layout)], lengths)


def test_plain_ustar_without_pax(tmp_path, layout):
    path = tmp_path / "shard.tar"
    write_shard(path, layout, 0, blocks_of(layout, 2, 3))
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.type, member.mtime, member.uid, member.uname) == (tarfile.REGTYPE, 0, 0, "")
            assert not member.pax_headers
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_bytes_are_deterministic_and_the_name_appears_only_when_whole(tmp_path, layout):
    def failing():
        yield next(blocks_of(layout, 2, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", layout, 0, failing())
    assert list(tmp_path.iterdir()) == []
    first = write_shard(tmp_path / "a.tar", layout, 0, blocks_of(layout, 2, 1))
    again = write_shard(tmp_path / "b.tar", layout, 0, blocks_of(layout, 2, 1))
    assert first == again
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_overhead_is_small_at_the_default_size():
    layout = Layout(512, "uint16", 1024, 128, False)
    assert layout.shard_bytes(128, 1024) < 1.005 * 128 * 1024 * 1024


def test_npy_header_is_numpys_own(tmp_path, layout):
    path = tmp_path / "shard.tar"
    [(tokens, _)] = blocks_of(layout, 1, 3)
    write_shard(path, layout, 0, [(tokens, None)])
    with tarfile.open(path) as tar:
        payload = tar.extractfile(tar.getmembers()[0]).read()
    assert np.array_equal(np.load(io.BytesIO(payload), allow_pickle=False), tokens)


def test_blocks_for_a_shard_size():
    assert blocks_for(128 << 20, 512, "uint16", 1024, False) == 127
    assert blocks_for(1, 512, "uint16", 1024, False) == 1
