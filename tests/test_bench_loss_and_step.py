"""The benches at a tiny size: they measure what they say, and what others compute is the same objective."""

import json

import pytest
import torch

from minilm.model.errors import ModelError
from minilm.orchestrator.bench import loss as bench
from minilm.orchestrator.bench import step as bench_step
from minilm.orchestrator.bench.loss import bench_loss, json_lines, peak_bytes, table
from minilm.orchestrator.bench.peers import PEERS
from minilm.orchestrator.bench.step import Size, step_flop

TINY = {"teacher": Size(2, 16), "batch": 2, "tokens": 12, "heads": 2, "repeats": 2, "vocabulary": 30}


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch):
    for module in (bench, bench_step):
        monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1e11)


def test_loss_rows_and_their_two_forms():
    rows = bench_loss(
        batch=1,
        heads=2,
        tokens=16,
        teacher_size=8,
        student_size=4,
        implementations=("reference", "tiled"),
        repeats=3,
    )
    assert [row.way for row in rows] == ["reference", "tiled"]
    for row, parsed in zip(rows, map(json.loads, json_lines(rows).splitlines()), strict=True):
        assert 0 < row.low_seconds <= row.median_seconds <= row.high_seconds
        assert row.tokens_per_second == pytest.approx(16 / row.median_seconds)
        assert row.flop_per_second == pytest.approx(2 * 2 * 16 * 16 * (8 + 3 * 4) / row.median_seconds)
        assert parsed["way"] == row.way and parsed["torch"] == torch.__version__
    assert len(table(rows).splitlines()) == 4 and "1.00x" in table(rows)


def test_step_rows_of_one_student_and_of_several_on_one_teacher_pass(monkeypatch):
    monkeypatch.setattr(
        bench, "peak_bytes", lambda step, held, device: step() or 7
    )  # the profiler takes seconds
    rows = bench_step.bench_step(students=[Size(2, 8), Size(1, 8)], **TINY)
    assert [(row.way, row.shape) for row in rows] == [
        ("by-hand", "2x16 to 2x8, 2x12"),
        ("ours", "2x16 to 2x8, 2x12"),
        ("by-hand", "2x16 to 1x8, 2x12"),
        ("ours", "2x16 to 1x8, 2x12"),
        ("ours", "2x16 to 2x8 + 1x8, 2x12"),
    ]
    assert {row.peak_memory_bytes for row in rows} == {7}
    (row,) = bench_step.bench_step(students=[Size(1, 8)], ways=["ours"], micro_batches=3, **TINY)
    assert row.shape == "2x16 to 1x8, 3 of 2x12"
    assert row.tokens_per_second * row.median_seconds == pytest.approx(3 * 2 * 12)


@pytest.fixture
def gradients(monkeypatch):
    """A function of a way and an objective: its student's gradients of three micro-batches, without dropout, and with
    weights that are the same for every way."""
    config = bench_step.AutoConfig.for_model(
        "bert",
        vocab_size=30,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ids = torch.randint(0, 30, (3, 2, 9), generator=torch.Generator().manual_seed(0))

    def of(way, objective):
        compared = bench_step._objective(objective, 2, [Size(2, 16), Size(2, 8)])
        step, held = bench_step._STEPS[way](config, [Size(2, 8)], ids, torch.float32, compared)
        optimizer = next(part for part in held if isinstance(part, torch.optim.Optimizer))
        student = held[0].students["0-2x8"].model if way == "ours" else held[0]
        teacher = held[1].model if way == "ours" else held[1]
        for seed, model in ((1, student), (2, teacher)):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _, parameter in sorted(model.named_parameters()):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        student.eval()
        monkeypatch.setattr(optimizer, "zero_grad", lambda set_to_none: None)
        step()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    return of


WAYS = [(way, "minilmv2") for way in PEERS] + [(way, "minilm") for way in PEERS if PEERS[way].mixes]


@pytest.mark.parametrize(("way", "objective"), WAYS)
def test_every_peer_computes_the_gradient_of_ours(gradients, way, objective):
    ours, theirs = gradients("ours", objective), gradients(way, objective)
    for name, gradient in ours.items():
        assert gradient.count_nonzero()
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5)
    assert all(torch.count_nonzero(theirs[name]) == 0 for name in theirs.keys() - ours.keys())


def test_peers_are_measured_with_the_relations_that_they_publish(monkeypatch):
    monkeypatch.setattr(bench, "peak_bytes", lambda step, held, device: step() or 7)
    rows = bench_step.bench_step(
        students=[Size(1, 8), Size(1, 16)], ways=[*PEERS, "ours"], objective="minilmv2", **TINY
    )
    assert [row.way for row in rows] == [*PEERS, "ours", *PEERS, "ours", "ours"]
    assert {row.shape for row in rows[:5]} == {"2x16 to 1x8, 2x12, minilmv2"}
    for row in rows[:5]:
        assert row.flop_per_second * row.median_seconds == pytest.approx(
            step_flop(Size(2, 16), [Size(1, 8)], 2, 12, num_relations=3)
        )


def test_what_a_peer_or_a_size_cannot_compute():
    with pytest.raises(ModelError) as refused:
        bench_step.bench_step(ways=["paddlenlp"], **TINY)
    assert str(refused.value) == (
        "paddlenlp compares queries, keys and values with themselves only, and minilm queries with keys; use"
        " --objective minilmv2, or leave it out"
    )
    with pytest.raises(ModelError) as refused:
        bench_step.bench_step(students=[Size(1, 12)], objective="minilmv2", **TINY)
    assert str(refused.value) == (
        "minilmv2 is measured with 8 relation heads, four for each attention head, which do not divide a hidden size"
        " of 12; give sizes that are multiples of it"
    )


def test_ways_are_timed_in_turns(monkeypatch):
    """What slows the machine for a while, slows all ways."""
    calls = []
    monkeypatch.setattr(bench, "peak_bytes", lambda step, held, device: 7)
    ways = {name: bench.Way(lambda name=name: calls.append(name), []) for name in "ab"}
    rows = bench.measure("step", ways, "small", "cpu", torch.bfloat16, 8, 1.0, 1e9, 3)
    assert "".join(calls) == "aabb" + "ababab"
    assert [(row.way, row.dtype) for row in rows] == [("a", "bfloat16"), ("b", "bfloat16")]


def test_peak_memory_counts_what_is_held_and_what_a_step_adds():
    held = torch.zeros(1000)

    def step():
        a = torch.zeros(5000)
        del a
        b = torch.zeros(3000)
        c = torch.zeros(4000)
        return b, c

    assert peak_bytes(step, [held, held[10:]], "cpu") == 4 * (1000 + 7000)


def test_step_flop_is_the_derivation():
    """Per token at 512 tokens: about 176 MFLOP for BERT-base cut at its tap, 66 and 8 for a 6 x 384 student."""
    without = step_flop(Size(12, 768), [], 1, 512) / 512
    total = step_flop(Size(12, 768), [Size(6, 384)], 1, 512) / 512
    assert without / 1e6 == pytest.approx(176, rel=0.02)
    assert (total - without) / 1e6 == pytest.approx(66 + 8, rel=0.1)


def test_sizes():
    assert Size.parse("6x384") == Size(6, 384) and str(Size(6, 384)) == "6x384"
    with pytest.raises(ModelError, match=r"^'6-384' is no encoder size; write layers x hidden, as in 6x384$"):
        Size.parse("6-384")
