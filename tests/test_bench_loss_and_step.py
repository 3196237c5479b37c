"""The benches at a tiny size: they measure what they say, and what they write by hand is the same objective."""

import json

import pytest
import torch

from minilm.model.errors import ModelError
from minilm.orchestrator.bench import loss as bench
from minilm.orchestrator.bench import step as bench_step
from minilm.orchestrator.bench.loss import bench_loss, json_lines, peak_bytes, table
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


def test_by_hand_is_the_same_objective(monkeypatch):
    """Without dropout and with the same weights both ways give the same gradients, of three micro-batches here."""
    config = bench_step.AutoConfig.for_model(
        "bert",
        vocab_size=30,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ids = torch.randint(0, 30, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    gradients = {}
    for way in ("ours", "by-hand"):
        torch.manual_seed(0)
        step, held = bench_step._STEPS[way](config, [Size(2, 8)], ids, torch.float32)
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
        gradients[way] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name, gradient in gradients["ours"].items():
        torch.testing.assert_close(gradient, gradients["by-hand"][name], rtol=1e-3, atol=1e-5)
    extra = gradients["by-hand"].keys() - gradients["ours"].keys()
    assert all(torch.count_nonzero(gradients["by-hand"][name]) == 0 for name in extra)


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
