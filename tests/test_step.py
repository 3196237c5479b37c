"""One update: what it must not depend on, and AdamW against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import make_job

from data.stream import Stream
from orchestrator.step import StepOutcome, StudentState, derive_seed, train_step
from orchestrator.worker import build_distiller
from orchestrator.world import World

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"), control=None)


def one_step(job, *, micro_batch: int | None = None, students: tuple[str, ...] | None = None):
    """Run step 0 of a job and return its students, their flat gradients and the outcome."""
    distiller = build_distiller(job, ALONE.device)
    states = [
        StudentState(name, encoder.trained_parameters(), betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
        for name, encoder in distiller.students.items()
    ]
    stream = Stream(
        Path(job.data), seed=job.seed, batch=job.batch, micro_batch=micro_batch or job.micro_batch
    )
    batches = ((i, *stream.micro_batch(0, i)[:2]) for i in range(stream.num_micro_batches))
    outcome = train_step(
        distiller,
        states,
        batches,
        step=0,
        seed=job.seed,
        learning_rate=1e-3,
        max_gradient_norm=None,
        autocast=None,
        stop=False,
        world=ALONE,
    )
    return distiller, states, outcome


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(shards, teacher, tmp_path):
    """Compared as gradients: AdamW would hide a wrong scale."""
    job = make_job(shards, teacher, tmp_path, dropout=0.0)
    (whole,), (cut,) = (one_step(job, micro_batch=m)[1] for m in (8, 2))
    assert whole.gradient.norm() > 1e-3
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss_over_sequences(shards, teacher, tmp_path):
    """Against autograd on the public function over the whole batch at once."""
    from model.relations import relation_kl

    job = make_job(shards, teacher, tmp_path, dropout=0.0)
    _, (state,), _ = one_step(job)
    distiller = build_distiller(job, ALONE.device)
    stream = Stream(Path(job.data), seed=job.seed, batch=job.batch, micro_batch=job.batch)
    ids, mask, _ = stream.micro_batch(0, 0)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    taught, own = distiller.teach(ids, mask), distiller.students["small"](ids, mask)
    loss = relation_kl(taught.q, taught.k, own.q, own.k, mask) + relation_kl(
        taught.v, taught.v, own.v, own.v, mask
    )
    parameters = distiller.students["small"].trained_parameters()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
    torch.testing.assert_close(state.gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_student_gets_the_same_gradient_with_and_without_another_beside_it(shards, teacher, tmp_path):
    both = make_job(shards, teacher, tmp_path, students=(("small", 2, 24), ("other", 1, 48)))
    alone = make_job(shards, teacher, tmp_path, students=(("small", 2, 24),))
    assert torch.equal(one_step(both)[1][0].gradient, one_step(alone)[1][0].gradient)


def test_the_teacher_is_bit_identical_after_a_step_and_has_no_gradient(shards, teacher, tmp_path):
    from model.export import weights_digest

    distiller, _, _ = one_step(make_job(shards, teacher, tmp_path))
    model = distiller.teacher.model
    assert weights_digest({k: v for k, v in model.state_dict().items()}) == weights_digest(teacher)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_biases_and_norms_are_not_decayed(shards, teacher, tmp_path):
    _, (state,), _ = one_step(make_job(shards, teacher, tmp_path))
    names = {id(p): name for name, p in state.parameters.items()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in state.optimizer.param_groups)
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert state.optimizer.param_groups[1]["weight_decay"] == 0.0
    assert all(n.endswith("bias") or "LayerNorm" in n for n in others)
    assert not any(n.endswith("bias") or "LayerNorm" in n for n in decayed)
    assert len(decayed) + len(others) == len(state.parameters)


def test_the_first_update_is_adam_with_decoupled_decay():
    parameter = torch.nn.Parameter(torch.tensor([[0.5, -2.0]]))
    state = StudentState("s", {"w": parameter}, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    gradient = torch.tensor([6.0, -0.3])
    state.gradient.copy_(gradient)
    norm = state.update(count=2.0, learning_rate=0.01, max_gradient_norm=None)
    mean = (gradient / 2).double()
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
        assert state.update(count=1.0, learning_rate=0.0, max_gradient_norm=norm) == pytest.approx(5.0)
        assert float(state.gradient.norm()) == pytest.approx(expected, rel=1e-5)


def test_a_request_to_stop_is_in_the_outcome(shards, teacher, tmp_path):
    outcome = one_step(make_job(shards, teacher, tmp_path))[2]
    assert isinstance(outcome, StepOutcome)
    assert outcome.count == 8
    assert outcome.stop is False


def test_seeds_are_fixed_for_ever_and_differ():
    assert derive_seed(1, "dropout", "small", 0, 0) == 237497368310658974
    seeds = {derive_seed(1, "dropout", "small", step, index) for step in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
