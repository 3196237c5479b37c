"""Every file of a data set is pinned: damage is never called whole, changes no row, and gets into no export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilm.data.errors import DataError
from minilm.data.format.manifest import Manifest, load_manifest, parse_manifest
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.tools.repair import repair
from minilm.data.tools.verify import verify
from minilm.orchestrator.feed.corpora import check_exported_tokenizer, describe
from minilm.orchestrator.stage.data import CorpusSpec, DataSpec
from tests.bad_server import BadServer
from tests.data_cases import make_data
from tests.test_data_tokenizer import without_pins

SMALL_FILES = [
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "build.json",
    "report/report.json",
    "report/report.txt",
    "report/lengths.png",
]
OF_THE_BUILD = SMALL_FILES[2:]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("pins"), held_out=0.3, documents=40)


@pytest.fixture
def data(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def rows_of(folder: Path) -> list[np.ndarray]:
    return [
        reader.read(range(reader.num_rows)).input_ids.numpy()
        for reader in (RowReader(folder), RowReader(folder / "held-out"))
    ]


def test_the_last_byte_of_every_file_counts(data):
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        try:
            assert not verify(data).whole, path
        except DataError:
            assert path.name == "manifest.json"
        path.write_bytes(whole)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_are_pinned_by_name(data, name):
    flip(data / name, 30)
    what = "sha256 that it holds" if name == "build.json" else "pinned sha256"
    assert [(d.file, d.what) for d in verify(data).damage] == [(name, f"its bytes do not have the {what}")]
    (data / name).unlink()
    assert [(d.file, d.what) for d in verify(data).damage] == [(name, "the file is missing")]


def test_a_held_out_split_that_is_gone_is_damage(data):
    shutil.rmtree(data / "held-out")
    assert [d.file for d in verify(data).damage] == ["held-out/manifest.json"]


def test_files_that_nothing_pins_are_named_and_not_called_whole(data):
    (data / "notes.md").write_text("mine")
    (data / "tokenizer" / "added_tokens.json").write_text("{}")
    report = verify(data)
    assert report.whole and report.not_pinned == ["notes.md", "tokenizer/added_tokens.json"]
    assert "whole: every byte of all other files is what the manifest" in report.text()
    assert report.text().endswith("not pinned, so not compared: notes.md, tokenizer/added_tokens.json")


def test_a_data_set_of_before_there_were_pins_stays_usable(data, tmp_path):
    old = without_pins(data, tmp_path / "old")
    report = verify(old)
    assert report.whole and set(SMALL_FILES) < set(report.not_pinned)
    assert load_manifest(old).fingerprint == load_manifest(data).fingerprint
    assert (
        describe([CorpusSpec("a", str(old))]).fingerprint
        == describe([CorpusSpec("a", str(data))]).fingerprint
    )
    flip(old / "tokenizer" / "tokenizer.json", 5)
    assert [d.file for d in verify(old).damage] == ["tokenizer"]
    with pytest.raises(
        DataError, match="data set .*old is damaged: tokenizer: .*repair it with `minilm data repair`"
    ):
        describe([CorpusSpec("a", str(old))])


def test_behind_a_url_what_an_older_data_set_does_not_pin_is_named(data, tmp_path):
    server = BadServer(without_pins(data, tmp_path / "old"))
    report = verify(server.url)
    server.close()
    assert report.whole and report.not_pinned == [
        "tokenizer/",
        "held-out/tokenizer/",
        "build.json",
        "report/",
    ]


def test_pins_change_no_fingerprint_and_cannot_be_lost(data):
    manifest = load_manifest(data)
    assert replace(manifest, files={}).fingerprint == manifest.fingerprint
    raw = (data / "manifest.json").read_bytes()
    assert raw == manifest.content
    for damaged in (
        raw.replace(b'"pins"', b'"pinz"'),
        raw[:-1],
        raw.replace(b"tokenizer.json", b"tokenizer.jsom"),
        raw + b" ",
    ):
        with pytest.raises(DataError, match="is damaged"):
            parse_manifest(damaged, "m")
    old = replace(manifest, files={}, tokenizer=manifest.tokenizer._replace(pipeline_fingerprint=""))
    assert set(json.loads(old.content)) == {"fingerprint", "manifest"}
    assert parse_manifest(old.content, "m") == old and isinstance(old, Manifest)


def test_a_run_finds_a_damaged_tokenizer_before_it_starts_and_before_an_export(data):
    spec = describe([CorpusSpec("a", str(data))])
    assert set(spec.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    assert DataSpec.from_values(json.loads(json.dumps(spec.to_values()))) == spec
    check_exported_tokenizer(spec)
    flip(data / "tokenizer" / "tokenizer_config.json", 30)
    with pytest.raises(
        DataError,
        match=r"tokenizer_config.json' is damaged \(its bytes .*\), so no model is exported with it; put the",
    ):
        check_exported_tokenizer(spec)
    with pytest.raises(
        DataError, match=r"is damaged: tokenizer/tokenizer_config.json: its bytes .*; repair it with"
    ):
        describe([CorpusSpec("a", str(data))])


def test_a_damaged_tokenizer_behind_a_url_is_found(data, tmp_path):
    server = BadServer(data)
    try:
        assert verify(server.url).whole
        near = RemoteReader(server.url, cache=tmp_path / "cache")
        near.close()
        flip(near.folder / "tokenizer" / "tokenizer.json", 30)  # the node's copy: fetched again
        RemoteReader(server.url, cache=tmp_path / "cache").close()
        assert (near.folder / "tokenizer" / "tokenizer.json").read_bytes() == (
            data / "tokenizer" / "tokenizer.json"
        ).read_bytes()
        flip(data / "tokenizer" / "tokenizer.json", 30)
        assert [d.file for d in verify(server.url).damage] == ["tokenizer/tokenizer.json"]
        with pytest.raises(DataError, match=r"tokenizer/tokenizer.json: its bytes .* put a whole copy there"):
            RemoteReader(server.url, cache=tmp_path / "other")
    finally:
        server.close()


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_are_repaired_from_a_mirror(data, original, name):
    flip(data / name, 30)
    assert repair(data, mirror=original).replaced == (
        sorted(OF_THE_BUILD) if name in OF_THE_BUILD else [name]
    )
    assert (data / name).read_bytes() == (original / name).read_bytes()


def test_a_new_build_gives_back_tokenizer_and_report_and_says_which_build_they_are_of(data, original):
    before = load_manifest(data)
    flip(data / "tokenizer" / "tokenizer.json", 30)
    flip(data / "report" / "report.txt", 30)
    assert repair(data, processes=1).replaced == [*sorted(OF_THE_BUILD), "tokenizer/tokenizer.json"]
    after = load_manifest(data)
    assert after.fingerprint == before.fingerprint and after.tokenizer_files == before.tokenizer_files
    assert verify(data).whole and "documents" in (data / "report" / "report.txt").read_text()
    for split in (data, data / "held-out"):
        flip(split / "tokenizer" / "tokenizer.json", 30)
    with pytest.raises(
        DataError, match="holds no whole tokenizer to build with; name a whole copy as mirror"
    ):
        repair(data)
