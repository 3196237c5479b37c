"""Care: every damage is listed, repair gives back the same bytes, conversion keeps every row."""

import errno
import hashlib
import os
import random
import shutil

import numpy as np
import pytest
import webdataset

from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.reader import RowReader
from minilm.data.tools.convert import convert
from minilm.data.tools.repair import repair
from minilm.data.tools.verify import verify
from tests.bad_server import BadServer
from tests.data_cases import make_data, make_documents


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("care"), held_out=0.3, documents=80)


@pytest.fixture
def data(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.parent.name != "report"
    }


def damage(data):
    """Damage of every kind; the names of the damaged files."""
    manifest = load_manifest(data)
    flip(data / "shard-000000.tar", manifest.layout.tokens_at(2) + 1)
    flip(data / "shard-000000.tar", manifest.layout.tokens_at(4) + 1)
    (data / "shard-000001.tar").write_bytes((data / "shard-000001.tar").read_bytes()[:5000])
    (data / "shard-000002.tar").unlink()
    flip(data / "held-out" / "shard-000000.tar", 700)
    flip(data / "blocks.xxh3", 3)
    shutil.rmtree(data / "held-out" / "tokenizer")
    return {
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
        "held-out/shard-000000.tar",
        "blocks.xxh3",
        "held-out/tokenizer/tokenizer.json",
        "held-out/tokenizer/tokenizer_config.json",
    }


def test_a_whole_data_set_is_said_to_be_whole(data):
    told = []
    report = verify(data, progress=lambda done, total: told.append((done, total)))
    assert report.whole and "whole: every byte is what the manifest" in report.text()
    sizes = sum(path.stat().st_size for path in data.rglob("*.tar"))
    assert report.num_bytes == sizes and told[-1] == (sizes, sizes)


def test_every_damage_is_listed_with_its_place(data):
    layout = load_manifest(data).layout
    (data / "shard-000001.tar").write_bytes((data / "shard-000001.tar").read_bytes()[:5000])
    flip(data / "shard-000000.tar", layout.tokens_at(2) + 1)
    flip(data / "shard-000000.tar", layout.tokens_at(4) + 1)
    report = verify(data)
    places = [(d.file, d.block, d.offset) for d in report.damage]
    assert places == [
        ("shard-000000.tar", 2, layout.begin_of_block(2)),
        ("shard-000000.tar", 4, layout.begin_of_block(4)),
        ("shard-000001.tar", None, None),
    ]
    assert f"repair it with: minilm data repair {data}" in report.text()
    assert "the file has 5000 bytes instead of" in report.text()


def test_a_disk_that_fails_is_listed_and_ends_nothing(data, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fail)
    shards = {d.what for d in verify(data).damage if d.file.startswith("shard-")}
    assert shards == {"its bytes do not have the pinned sha256"}
    others = {d.what for d in verify(data).damage if d.file.startswith("tokenizer/")}
    assert others == {f"its bytes cannot be read ({os.strerror(errno.EIO)})"}
    monkeypatch.setattr(os, "preadv", fail)
    blocks = [d.block for d in verify(data).damage if d.file.startswith("shard-")]
    assert blocks == list(range(load_manifest(data).num_blocks))


def test_damage_of_every_kind_is_repaired_from_a_mirror(data, original):
    names = damage(data)
    assert {d.file for d in verify(data).damage} == names
    report = repair(data, mirror=original)
    assert set(report.replaced) == names
    assert files_of(data) == files_of(original)
    assert repair(data, mirror=original).text().endswith("nothing is damaged")


@pytest.fixture
def mirror(original, tmp_path):
    running = BadServer(shutil.copytree(original, tmp_path / "served"))
    yield running
    running.close()


def test_damage_of_every_kind_is_repaired_from_a_mirror_behind_a_url(data, original, mirror):
    names = damage(data)
    mirror.faults = {"shard-000001.tar": ["500", "reset"]}
    report = repair(data, mirror=mirror.url)
    assert set(report.replaced) == names and report.source == mirror.url
    assert files_of(data) == files_of(original) and not (data / ".repair").exists()
    fetched = {name for name in mirror.requests if name.endswith(".tar")}
    assert fetched == {name for name in names if name.endswith(".tar")}  # only what is damaged


def test_a_mirror_behind_a_url_with_other_data_or_damage_is_refused(data, mirror, tmp_path):
    before = damage(data) and files_of(data)
    flip(mirror.folder / "shard-000001.tar", 5000)
    with pytest.raises(DataError, match=rf"{mirror.url}/shard-000001.tar: the object was replaced"):
        repair(data, mirror=mirror.url)
    other = make_data(tmp_path / "other", documents=30)
    shutil.copyfile(other / "manifest.json", mirror.folder / "manifest.json")
    with pytest.raises(DataError, match="holds other data"):
        repair(data, mirror=mirror.url)
    assert files_of(data) == before


def test_damage_of_every_kind_is_repaired_from_the_text(data, original):
    damage(data)
    report = repair(data, processes=1)
    assert report.source == "a new build"
    assert files_of(data) == files_of(original)


def test_a_mirror_with_other_data_or_damage_is_refused_and_nothing_bad_is_taken(data, original, tmp_path):
    other = make_data(tmp_path / "other", documents=30)
    flip(data / "shard-000001.tar", 5000)
    before = files_of(data)
    with pytest.raises(
        DataError, match=r"holds other data .* than .*; repair needs a copy of the same data set"
    ):
        repair(data, mirror=other)
    assert files_of(data) == before
    bad = shutil.copytree(original, tmp_path / "bad")
    flip(bad / "shard-000001.tar", 6000)
    with pytest.raises(
        DataError,
        match="is damaged too: shard-000001.tar, block .*; its undamaged files were taken; name another mirror",
    ):
        repair(data, mirror=bad)
    (bad / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="is missing there too"):
        repair(data, mirror=bad)


def test_text_that_changed_cannot_repair(data, tmp_path):
    flip(data / "shard-000001.tar", 5000)
    (tmp_path / "new.txt").write_text("\n\n".join(make_documents(80, seed=1)))
    with pytest.raises(DataError, match="holds other data"):
        repair(data, inputs=[tmp_path / "new.txt"], processes=1)
    assert not (data / ".repair").exists()
    (data / "build.json").unlink()
    with pytest.raises(DataError, match=r"does not know how it was built .*name a whole copy as mirror"):
        repair(data)


def test_conversion_gives_one_record_a_row(tmp_path):
    data = make_data(tmp_path / "d", packing="document", documents=20)
    report = convert(data, tmp_path / "rows", rows_per_file=50)
    reader = RowReader(data)
    assert report.rows == reader.num_rows and len(report.files) > 1
    urls = [str(tmp_path / "rows" / name) for name in report.files]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [int(sample["__key__"]) for sample in samples] == list(range(reader.num_rows))
    whole = reader.read(range(reader.num_rows))
    for sample, ids, mask in zip(samples, whole.input_ids, whole.mask, strict=True):
        assert np.array_equal(sample["tokens.npy"], ids[mask].numpy())
    with pytest.raises(DataError, match=r"rows' exists; name a new folder"):
        convert(data, tmp_path / "rows")
    with pytest.raises(DataError, match="conversion to 'parquet' is not known; allowed: rows"):
        convert(data, tmp_path / "x", to="parquet")


def rows_of(data):
    """All rows of both splits."""
    found = []
    for split in (data, data / "held-out"):
        reader = RowReader(split)
        batch = reader.read(np.arange(reader.num_rows))
        found.append(batch.input_ids.numpy().tobytes())
    return found


def damage_one_by_one(data, rng, count):
    """Damages a file `count` times; a line for each time that a row changed, or that verify calls the data whole."""
    wanted, wrong = rows_of(data), []
    paths = sorted(path for path in data.rglob("*") if path.is_file())
    for number in range(count):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        raw, what = bytearray(whole), rng.choice(["flip", "flip", "cut", "empty", "append", "zero"])
        at = rng.randrange(len(raw))
        match what:
            case "flip":
                raw[at] ^= 1 << rng.randrange(8)
            case "cut":
                del raw[at:]
            case "empty":
                raw.clear()
            case "append":
                raw += rng.choice([b"\0", b"\n", b" ", rng.randbytes(600)])
            case "zero":
                raw[at : at + 16] = bytes(len(raw[at : at + 16]))
        if raw == whole:
            continue
        path.write_bytes(raw)
        place = f"{path.relative_to(data)}: {what} at {at}"
        try:
            if verify(data, threads=1).whole:
                wrong.append(f"{place}: verify calls it whole")
        except DataError as error:
            if "\n" in str(error):
                wrong.append(f"{place}: {error}")
        try:
            if rows_of(data) != wanted:
                wrong.append(f"{place}: rows changed")
        except DataError:
            pass  # refusing to read is right; other rows would be wrong
        path.write_bytes(whole)
    assert verify(data).whole and rows_of(data) == wanted
    return wrong


def test_no_damage_of_any_file_is_silent(data):
    assert damage_one_by_one(data, random.Random(1), 80) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_damage_of_a_thousand_is_silent(data):
    assert damage_one_by_one(data, random.Random(2), 1000) == []
