"""`minilm bench`: the arguments reach the benches, the rows come out as a table or as JSON lines."""

import argparse
import json
import os

import pytest
import torch

from minilm.model.errors import ModelError
from minilm.orchestrator import cli
from minilm.orchestrator.bench import loss as bench
from minilm.orchestrator.bench import step as bench_step
from minilm.orchestrator.verbs.bench import add_bench_verbs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (bench, bench_step):
        monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "peak_bytes", lambda step, held, device: step() or 7)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_bench_verbs(parser)
    options = parser.parse_args([*arguments, "--device", "cpu", "--heads", "2", "--repeats", "2"])
    return options.run(options)


def test_loss_prints_a_table(capsys):
    assert call("loss", "--batch", "1", "--tokens", "8", "--heads-of", "8,4") == 0
    out = capsys.readouterr().out
    assert "reference" in out and "tiled" in out and "1x2x8x8, heads of 8 and 4" in out


def test_step_prints_json_lines(capsys):
    assert (
        call("step", "--teacher", "2x8", "--students", "1x4,1x8", "--batch", "1", "--tokens", "8", "--json")
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["by-hand", "ours", "by-hand", "ours", "ours"]
    assert rows[-1]["shape"] == "2x8 to 1x4 + 1x8, 1x8" and rows[0]["bench"] == "step"


def test_a_way_that_does_not_exist():
    with pytest.raises(
        ModelError, match=r"^way 'theirs' is not known; use ours, ours-compiled, by-hand, minilmv2"
    ):
        call("step", "--ways", "theirs")


def test_a_step_against_peers(capsys):
    sizes = ("--teacher", "2x16", "--students", "1x8", "--batch", "1", "--tokens", "8", "--json")
    assert call("step", *sizes, "--against", "bertdistiller,paddlenlp") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["bertdistiller", "paddlenlp", "by-hand", "ours"]
    assert {row["shape"] for row in rows} == {"2x16 to 1x8, 1x8, minilmv2"}
    assert call("step", *sizes, "--against", "bertdistiller", "--objective", "minilm") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["shape"] == "2x16 to 1x8, 1x8"


def test_gradient_sum_prints_a_row_for_each_sum(capsys):
    parser = argparse.ArgumentParser()
    add_bench_verbs(parser)
    words = [
        "gradient-sum",
        "--parameters",
        "1000",
        "--micro-batches",
        "2",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    options = parser.parse_args(words)
    assert options.run(options) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (header, *rows)] == ["sum", "exact", "fast"]
    options = parser.parse_args([*words, "--json"])
    assert options.run(options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["gradient_sum"], row["parameters"], row["micro_batches"]) for row in rows] == [
        ("exact", 1000, 2),
        ("fast", 1000, 2),
    ]


def test_a_step_of_several_micro_batches(capsys):
    sizes = ("--teacher", "2x8", "--students", "1x4", "--batch", "1", "--tokens", "8", "--ways", "ours")
    assert call("step", *sizes, "--micro-batches", "2") == 0
    assert "2x8 to 1x4, 2 of 1x8" in capsys.readouterr().out


def test_a_step_with_deterministic_kernels(capsys, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # given by whoever runs it, it stays
    before = torch.utils.deterministic.fill_uninitialized_memory
    sizes = ("--teacher", "2x8", "--students", "1x4", "--batch", "1", "--tokens", "8", "--ways", "ours")
    try:
        assert call("step", *sizes) == 0 and not torch.are_deterministic_algorithms_enabled()
        assert call("step", *sizes, "--deterministic") == 0 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert capsys.readouterr().out.count("2x8 to 1x4, 1x8") == 2


@pytest.mark.parametrize(
    "verb",
    [
        ["overhead", "recipe.yaml", "--rounds"],
        ["step", "--batch"],
        ["save", "--rounds"],
        ["stream", "--repeats"],
    ],
)
def test_a_size_of_nothing_is_refused(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *verb, "0"])
    assert ended.value.code == 2
    assert f"argument {verb[-1]}: given '0'; allowed: a whole number above 0" in capsys.readouterr().err
