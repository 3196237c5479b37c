"""Sums of micro-batches: exact ones do not depend on order or workers, bit for bit; fast ones only but for rounding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilm.model.export import weights_digest
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.gradient_sum import GRADIENT_UNIT, ExactSum, FastSum, make_sum
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.support import finished_as, make_spec

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU, control=None)
CLOCK = ("rows_per_second", "tokens_per_second", "input_wait_share", "data/rows_read", "data/bytes_read")


def parts(count: int, size: int = 1000, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of many magnitudes, and two loss terms, of `count` micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 4, (count, size), generator=generator).float().exp2()
    gradients = torch.randn(count, size, generator=generator) * exponents
    return list(zip(gradients, torch.rand(count, 2, generator=generator) * 30, strict=True))


def added(kind: str, given: list[tuple[torch.Tensor, torch.Tensor]], count: float = 3.0):
    total = make_sum(kind, given[0][0].numel(), 2, CPU, len(given))
    total.begin()
    for gradient, terms in given:
        total.gradient += gradient
        total.add(terms)
    means, finite = total.finish(ALONE, count)
    return total.gradient.clone(), means, bool(finite)


def test_an_exact_sum_is_the_same_in_every_order_and_a_fast_one_is_not():
    given = parts(5)
    exact, fast = (
        {(g.numpy().tobytes(), t.numpy().tobytes()) for g, t, _ in results}
        for results in (
            [added(kind, list(order)) for order in itertools.permutations(given)]
            for kind in ("exact", "fast")
        )
    )
    assert len(exact) == 1
    assert len(fast) > 1


@pytest.mark.parametrize("kind", ["exact", "fast"])
def test_sums_are_near_those_in_float64(kind):
    given = parts(8)
    truth = torch.stack([g.double() for g, _ in given]).sum(0) / 3
    gradient, terms, finite = added(kind, given)
    assert finite
    absolute = 8 * GRADIENT_UNIT / 2 / 3 if kind == "exact" else 1e-6
    assert ((gradient.double() - truth).abs() <= absolute + 2**-24 * truth.abs()).all()
    torch.testing.assert_close(
        terms, torch.stack([t.double() for _, t in given]).sum(0) / 3, rtol=1e-6, atol=0
    )


def test_chunks_do_not_matter(monkeypatch):
    given = parts(3, size=1001)
    whole = added("exact", given)
    monkeypatch.setattr("minilm.orchestrator.train.gradient_sum.CPU_CHUNK", 17)
    cut = added("exact", given)
    assert torch.equal(whole[0], cut[0])


@pytest.mark.parametrize("kind", ["exact", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "terms"])
def test_what_is_not_finite_is_told(kind, value, where):
    given = parts(3)
    given[1][where == "terms"][1] = value
    assert added(kind, given)[2] is False
    assert added(kind, parts(3))[2] is True


@pytest.mark.parametrize("where", ["gradient", "terms"])
def test_a_refused_step_has_no_number_that_looks_like_one(where):
    """NaN cast to int64 is the least integer: without care, a finite loss of -5e8."""
    for value in (float("nan"), 1e30):
        given = parts(3)
        given[1][where == "terms"][1] = value
        gradient, means, _ = added("exact", given)
        assert means.isnan().all()
        assert gradient.norm().isnan()


def test_an_exact_sum_says_when_a_value_is_beyond_its_range_and_holds_all_up_to_it():
    limit = 2.0 ** (21 - 2)  # four micro-batches
    for value, held in ((limit, True), (-limit, True), (limit * 1.001, False), (-limit * 1.001, False)):
        given = [(torch.tensor([value]), torch.zeros(2)) for _ in range(4)]
        gradient, _, finite = added("exact", given, count=1.0)
        assert finite is held
        if held:
            assert gradient.item() == 4 * value


def test_a_new_step_begins_with_nothing():
    given = parts(3)
    for total in (ExactSum(1000, 2, CPU, 3), FastSum(1000, 2, CPU)):
        results = []
        for _ in range(2):
            total.gradient.fill_(7.0)  # what an attempt that ran out of memory may leave
            total.begin()
            for gradient, terms in given:
                total.gradient += gradient
                total.add(terms)
            results.append([total.finish(ALONE, 1.0)[0], total.gradient.clone()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def logged(spec: StageSpec) -> list[tuple[int, dict[str, float]]]:
    points = read_all_metrics(StageFolder(Path(spec.folder)).step_metrics)
    return [(p.step, {k: v for k, v in p.metrics.items() if k not in CLOCK}) for p in points]


def through_a_schedule(spec: StageSpec, schedule: list[tuple[int, int, int]], last: int) -> None:
    """Run `spec` with (workers, killed rank, after the checkpoint of this step) in turn, then with `last` workers."""
    for workers, rank, step in schedule:
        codes = worker_pool.kill_at(spec, workers, rank, step)
        assert codes[rank] == -9, worker_pool.log(spec)
        assert 0 not in codes
    assert worker_pool.join(worker_pool.start(spec, last)) == [0] * last, worker_pool.log(spec)


def test_exact_weights_and_losses_are_bit_identical_for_any_workers_and_kills(shards, teacher, tmp_path):
    """1 → 2 → 1 → 3 → 2 workers with SIGKILLs between, against one undisturbed worker."""
    spec = make_spec(
        shards, teacher, tmp_path / "one", batch=12, steps=60, log_every=1, max_gradient_norm=1.0
    )
    assert run_stage(spec)
    disturbed = replace(spec, folder=str(tmp_path / "disturbed"))
    through_a_schedule(disturbed, [(1, 0, 6), (2, 1, 18), (1, 0, 27), (3, 0, 39)], last=2)
    one, other = (StageFolder(Path(j.folder)) for j in (spec, disturbed))
    assert weights_digest(one.student("small")) == weights_digest(other.student("small"))
    assert logged(spec) == logged(disturbed)
    assert finished_as(spec) == finished_as(disturbed)  # the ledger of rows too


def test_fast_losses_agree_but_for_rounding(shards, teacher, tmp_path):
    spec = make_spec(
        shards, teacher, tmp_path / "one", batch=12, steps=20, log_every=1, peak_lr=1e-4, gradient_sum="fast"
    )
    compare_fast(spec, tmp_path, kill_after=6)


@pytest.mark.slow
def test_fast_losses_agree_but_for_rounding_at_every_step_of_200(shards, teacher, tmp_path):
    spec = make_spec(
        shards, teacher, tmp_path / "one", batch=12, steps=200, log_every=1, peak_lr=1e-4, gradient_sum="fast"
    )
    compare_fast(spec, tmp_path, kill_after=60)


def compare_fast(spec: StageSpec, tmp_path: Path, kill_after: int) -> None:
    assert run_stage(spec)
    disturbed = replace(spec, folder=str(tmp_path / "disturbed"))
    through_a_schedule(disturbed, [(3, 2, kill_after)], last=2)
    ours, theirs = logged(spec), logged(disturbed)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert b["small/loss"] == pytest.approx(a["small/loss"], rel=1e-5)
    digests = [weights_digest(StageFolder(Path(j.folder)).student("small")) for j in (spec, disturbed)]
    assert digests[0] != digests[1]  # or exact sums would be for nothing
