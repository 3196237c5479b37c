"""The verbs of `minilm data`: arguments reach the functions, reports and errors reach the user."""

import argparse
import json
import shutil

import numpy as np
import pytest

from minilm.data.errors import DataError
from minilm.orchestrator.cli import add_data_verbs
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.bench import add_bench_verbs
from tests.data_cases import make_documents, make_tokenizer
from tests.test_data_foreign_formats import write_megatron


def minilm_data(*words):
    parser = argparse.ArgumentParser()
    add_data_verbs(parser)
    options = parser.parse_args([str(word) for word in words])
    return options.run(options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    make_tokenizer(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"t": d}) + "\n" for d in make_documents(80)))
    return folder


@pytest.fixture(scope="module")
def data(place):
    words = ["--tokenizer", place / "tokenizer", "--out", place / "data", "--seq-len", 16, "--held-out", 0.2]
    assert minilm_data("build", place / "text.jsonl", *words, "--processes", 1, "--seed", 3) == 0
    return place / "data"


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_build_reports(place, data, capsys):
    words = [
        "--tokenizer",
        place / "tokenizer",
        "--out",
        data,
        "--seq-len",
        16,
        "--held-out",
        0.2,
        "--seed",
        3,
    ]
    assert minilm_data("build", place / "text.jsonl", *words) == 0
    assert "documents   80" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"built differently \(seed changed\)"):
        minilm_data("build", place / "text.jsonl", *words[:-1], 4)


def test_import_reports(place, tmp_path, capsys):
    pair = write_megatron(tmp_path / "pair", [[list(range(5, 30))]] * 20)
    words = [
        "--from",
        "megatron",
        "--tokenizer",
        place / "tokenizer",
        "--out",
        tmp_path / "out",
        "--seq-len",
        16,
    ]
    with pytest.raises(DataError, match="do not say which vocabulary"):
        minilm_data("import", pair, *words)
    more = ["--source-tokenizer", place / "tokenizer", "--held-out", 0, "--processes", 1]
    assert minilm_data("import", pair, *words, *more) == 0
    assert "documents   20" in capsys.readouterr().out


def test_explain_and_where_agree(data, capsys):
    order = ["--batch", 8, "--seed", 5, "--json"]
    assert minilm_data("explain", data, "--step", 4, *order) == 0
    rows = told(capsys)["rows"]
    assert len(rows) == 8
    assert minilm_data("where", data, "--row", rows[3]["row"], "--epoch", rows[3]["epoch"], *order) == 0
    found = told(capsys)
    assert (found["step"], found["index"]) == (4, 3)
    mixed = [f"{data}=3", f"{data / 'held-out'}=1"]
    assert minilm_data("explain", *mixed, "--step", 0, *order, "--window", 1) == 0
    assert [row["corpus"] for row in told(capsys)["rows"]].count(1) == 2
    with pytest.raises(UserError, match="a weight is a number"):
        minilm_data("explain", f"{data}=much", "--step", 0, *order)


def test_verify_repair_inspect_convert(data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    assert minilm_data("verify", copy) == 0
    assert "whole: every byte" in capsys.readouterr().out
    shard = copy / "shard-000000.tar"
    raw = np.fromfile(shard, np.uint8)
    raw[6000] ^= 1
    raw.tofile(shard)
    assert minilm_data("verify", copy, "--json") == 2
    assert told(capsys)["damage"][0]["block"] == 0
    assert minilm_data("repair", copy, "--mirror", data) == 0
    assert "replaced from" in capsys.readouterr().out
    assert minilm_data("verify", copy) == 0
    capsys.readouterr()
    assert minilm_data("inspect", copy, "--page", 1, "--rows-per-page", 2, "--json") == 0
    assert list(told(capsys)["rows"]) == ["2", "3"]
    assert minilm_data("convert", copy, tmp_path / "rows") == 0
    assert "one record each" in capsys.readouterr().out


def test_bench_stream(capsys):
    parser = argparse.ArgumentParser()
    add_bench_verbs(parser)
    words = ["stream", "--rows", "2000", "--seq-len", "64", "--seconds", "0.01", "--repeats", "1", "--json"]
    options = parser.parse_args(words)
    assert options.run(options) == 0
    assert told(capsys)["rows"] == 2000
