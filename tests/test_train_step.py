"""One update: what it must not depend on, and AdamW against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minilm.orchestrator.feed.corpora import open_stream
from minilm.orchestrator.train.build import build_distiller, make_states
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.step import StepOutcome, StudentState, derive_seed, train_step
from tests.support import make_spec

ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


def one_step(spec, *, micro_batch=None, distiller=None, step=0, states=None, world=ALONE, **changes):
    """Run a step (0) of a stage and return its distiller, the students' states and the outcome."""
    distiller = distiller or build_distiller(spec, world.device)
    states = states or make_states(replace(spec, micro_batch=micro_batch or spec.micro_batch), distiller)
    stream = open_stream(
        spec.data, seed=spec.seed, batch=spec.batch, micro_batch=micro_batch or spec.micro_batch
    )
    batches = ((i, *stream.micro_batch(step, i).sequences) for i in range(stream.num_micro_batches))
    outcome = train_step(
        distiller,
        states,
        batches,
        step=step,
        seed=spec.seed,
        learning_rate=1e-3,
        world=world,
        seq_len=spec.data.seq_len,
        **{"max_gradient_norm": None, "autocast": None} | changes,
    )
    return distiller, states, outcome


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(shards, teacher, tmp_path):
    """Compared as gradients: AdamW would hide a wrong scale."""
    spec = make_spec(shards, teacher, tmp_path, dropout=0.0)
    (whole,), (cut,) = (one_step(spec, micro_batch=m)[1] for m in (8, 2))
    assert whole.gradient.norm() > 1e-3
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reduction", "data"), [("sequence", "shards"), ("token", "documents")])
def test_the_gradient_is_that_of_the_mean_loss(request, teacher, tmp_path, reduction, data):
    """Against autograd on the public function over the whole batch at once; `documents` have padding."""
    from minilm.model.loss.relations import relation_kl

    objective = {"name": "minilm", "reduction": reduction}
    spec = make_spec(request.getfixturevalue(data), teacher, tmp_path, dropout=0.0, objective=objective)
    _, (state,), outcome = one_step(spec)
    distiller = build_distiller(spec, ALONE.device)
    stream = open_stream(spec.data, seed=spec.seed, batch=spec.batch, micro_batch=spec.batch)
    ids, mask = stream.micro_batch(0, 0).sequences
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    taught, own = distiller.teacher_forward(ids, mask).taps, distiller.students["small"](ids, mask)
    attention = relation_kl(taught.q, taught.k, own.q, own.k, mask, reduction=reduction)
    loss = attention + relation_kl(taught.v, taught.v, own.v, own.v, mask, reduction=reduction)
    torch.testing.assert_close(outcome.terms.sum().float(), loss.detach(), rtol=1e-5, atol=0.0)
    parameters = distiller.students["small"].trained_parameters()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
    torch.testing.assert_close(state.gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient_sum", ["exact", "fast"])
def test_a_step_without_a_valid_token_is_no_failure(shards, teacher, tmp_path, gradient_sum):
    """All its rows may lie in damaged blocks that are masked."""
    spec = make_spec(shards, teacher, tmp_path, gradient_sum=gradient_sum)
    distiller = build_distiller(spec, ALONE.device)
    states = make_states(spec, distiller)
    ids = torch.zeros(spec.micro_batch, spec.data.seq_len, dtype=torch.int64)
    batches = [
        (i, ids, torch.zeros_like(ids, dtype=torch.bool)) for i in range(spec.batch // spec.micro_batch)
    ]
    outcome = train_step(
        distiller,
        states,
        iter(batches),
        step=0,
        seed=spec.seed,
        learning_rate=1e-3,
        max_gradient_norm=None,
        autocast=None,
        world=ALONE,
        seq_len=spec.data.seq_len,
    )
    assert outcome.terms.tolist() == [[0.0, 0.0]] and not states[0].gradient.any()
    assert states[0].skipped.tolist()[0] == 0, "it counts as a step"


def test_students_are_tapped_at_their_last_layer_and_the_teacher_where_the_job_says(
    shards, teacher, tmp_path
):
    """A known defect is a student whose first layer is tapped: the layers behind it would never be trained."""
    spec = make_spec(shards, teacher, tmp_path, students=(("small", 2, 24), ("deep", 3, 24)), teacher_layer=2)
    distiller = build_distiller(spec, ALONE.device)
    assert distiller.teacher.layer == 2
    assert {name: encoder.layer for name, encoder in distiller.students.items()} == {"small": 2, "deep": 3}
    assert "encoder.layer.2.attention.self.query.weight" in distiller.trained_parameters("deep")


def test_a_student_gets_the_same_gradient_with_and_without_another_beside_it(shards, teacher, tmp_path):
    both = make_spec(shards, teacher, tmp_path, students=(("small", 2, 24), ("other", 1, 48)))
    alone = make_spec(shards, teacher, tmp_path, students=(("small", 2, 24),))
    assert torch.equal(one_step(both)[1][0].gradient, one_step(alone)[1][0].gradient)


def test_the_teacher_is_bit_identical_after_a_step_and_has_no_gradient(shards, teacher, tmp_path):
    from minilm.model.export import weights_digest

    distiller, _, _ = one_step(make_spec(shards, teacher, tmp_path))
    model = distiller.teacher.model
    assert weights_digest({k: v for k, v in model.state_dict().items()}) == weights_digest(teacher)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_biases_and_norms_are_not_decayed(shards, teacher, tmp_path):
    _, (state,), _ = one_step(make_spec(shards, teacher, tmp_path))
    names = {id(p): name for name, p in state.parameters.items()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in state.optimizer.param_groups)
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert state.optimizer.param_groups[1]["weight_decay"] == 0.0
    assert all(n.endswith("bias") or "LayerNorm" in n for n in others)
    assert not any(n.endswith("bias") or "LayerNorm" in n for n in decayed)
    assert len(decayed) + len(others) == len(state.parameters)


TRUE = torch.tensor(True)


def test_the_first_update_is_adam_with_decoupled_decay():
    parameter = torch.nn.Parameter(torch.tensor([[0.5, -2.0]]))
    state = StudentState("s", {"w": parameter}, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    mean = torch.tensor([3.0, -0.15])
    state.gradient.copy_(mean)
    norm = state.update(TRUE, step=0, learning_rate=0.01, max_gradient_norm=None)
    mean = mean.double()
    assert norm == pytest.approx(float(mean.norm()))
    # after one update both bias-corrected moments are exactly g and g²
    start = torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = start * (1 - 0.01 * 0.1) - 0.01 * mean / (mean.abs() + 1e-6)
    torch.testing.assert_close(parameter.detach()[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up():
    for norm, expected in ((1.0, 1.0), (100.0, 5.0)):
        parameter = torch.nn.Parameter(torch.zeros(1, 2))
        state = StudentState("s", {"w": parameter}, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
        state.gradient.copy_(torch.tensor([3.0, 4.0]))
        given = state.update(TRUE, step=0, learning_rate=0.0, max_gradient_norm=norm)
        assert given == pytest.approx(5.0)
        assert float(state.gradient.norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("policy", "moves"), [("stop", False), ("skip", True)])
def test_a_gradient_that_is_not_finite_moves_nothing(policy, moves):
    """ "stop" freezes everything from there on; "skip" goes on as if that update had never been."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, generator=generator) for _ in range(3)]
    twins = []
    for given in ([*gradients[:1], torch.tensor([1.0, float("nan"), 1.0, 1.0]), *gradients[1:]], gradients):
        parameter = torch.nn.Parameter(torch.ones(2, 2))
        state = StudentState(
            "s", {"w": parameter}, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, on_nonfinite=policy
        )
        seen = []
        for step, gradient in enumerate(given):
            state.gradient.copy_(gradient)
            state.update(torch.isfinite(gradient).all(), step=step, learning_rate=0.1, max_gradient_norm=1.0)
            seen.append(parameter.detach().clone())
        twins.append((seen, state))
    (seen, state), (without, _) = twins
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[-1], without[-1]) is moves
    assert torch.equal(seen[-1], seen[0]) is not moves
    assert state.skipped.tolist() == [1, 1, int(not moves)]


@pytest.mark.parametrize("gradient_sum", ["exact", "fast"])
def test_a_loss_that_is_not_finite_is_seen_without_reading_the_device(
    shards, teacher, tmp_path, gradient_sum
):
    spec = make_spec(shards, teacher, tmp_path, gradient_sum=gradient_sum)
    distiller = build_distiller(spec, ALONE.device)
    with torch.no_grad():
        next(iter(distiller.students["small"].trained_parameters().values()))[5] = float("nan")
    before = {k: v.clone() for k, v in distiller.students["small"].model.state_dict().items()}
    _, (state,), _ = one_step(spec, distiller=distiller, step=7)
    assert state.skipped.tolist() == [1, 7, 1]
    for name, value in distiller.students["small"].model.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0))


@pytest.mark.parametrize("gradient_sum", ["exact", "fast"])
def test_values_by_head_average_to_their_terms_and_change_nothing(documents, teacher, tmp_path, gradient_sum):
    spec = make_spec(
        documents, teacher, tmp_path, gradient_sum=gradient_sum, students=(("small", 2, 24), ("other", 1, 48))
    )
    _, (plain, _), without = one_step(spec)
    _, (state, _), outcome = one_step(spec, by_head=True)
    assert torch.count_nonzero(without.heads) == 0
    assert (
        outcome.heads.shape == (2, 2, 4) and outcome.heads.dtype == torch.float64
    )  # students, relations, heads
    torch.testing.assert_close(outcome.heads.mean(-1), outcome.terms, rtol=1e-5, atol=0.0)
    assert (outcome.heads.std(-1) > 1e-3).all()
    assert torch.equal(outcome.terms, without.terms) and torch.equal(state.gradient, plain.gradient)


@pytest.mark.parametrize("gradient_sum", ["exact", "fast"])
def test_out_of_memory_halves_the_computation_and_not_the_batch(
    shards, teacher, tmp_path, gradient_sum, monkeypatch, caplog
):
    spec = make_spec(shards, teacher, tmp_path, dropout=0.0, gradient_sum=gradient_sum)
    whole, (expected,), outcome = one_step(spec)
    distiller = build_distiller(spec, ALONE.device)
    original, calls = distiller.term_sums, []

    def small_memory(name, taught, ids, mask, **rest):
        calls.append(len(ids))
        sums = original(name, taught, ids, mask, **rest)
        if len(ids) > 2 and len(calls) == 2:  # in the middle of the step, when a gradient is there already
            raise torch.OutOfMemoryError("not enough")
        return sums

    monkeypatch.setattr(distiller, "term_sums", small_memory)
    _, (state,), halved = one_step(spec, distiller=distiller)
    assert calls == [4, 4, 2, 2, 2, 2]
    assert halved.num_chunks == 2
    assert outcome.num_chunks == 1
    assert halved.count == outcome.count == 8
    torch.testing.assert_close(state.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(halved.terms, outcome.terms, rtol=1e-5, atol=0.0)
    assert "step 0: out of memory with 4 rows at once; from here on" in caplog.text


def test_out_of_memory_with_halves_too_is_raised(shards, teacher, tmp_path, monkeypatch):
    spec = make_spec(shards, teacher, tmp_path)
    distiller = build_distiller(spec, ALONE.device)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(distiller, "term_sums", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        one_step(spec, distiller=distiller)


def test_what_a_rank_tells_is_in_the_outcome(shards, teacher, tmp_path):
    order = []
    spec = make_spec(shards, teacher, tmp_path)
    distiller = build_distiller(spec, ALONE.device)
    teacher_forward = distiller.teacher_forward
    distiller.teacher_forward = lambda *a: order.append("rows") or teacher_forward(*a)
    outcome = one_step(spec, distiller=distiller, extra_values=lambda: order.append("tell") or [5, 6])[2]
    assert isinstance(outcome, StepOutcome)
    assert outcome.count == 8
    assert outcome.extra_sums == [5, 6]
    assert order == ["rows", "rows", "tell"]


def test_seeds_are_fixed_for_ever_and_differ():
    assert derive_seed(1, "dropout", "small", 0, 0) == 237497368310658974
    seeds = {derive_seed(1, "dropout", "small", step, index) for step in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
