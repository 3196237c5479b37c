"""Objectives as data: the papers' relations, weights, reductions, and terms that add up."""

import pytest
import torch

from minilm.model.encoder.shape import EncoderShape
from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.model.loss.relation_term import Relation
from minilm.model.loss.relations import relation_heads, relation_kl


def shape(heads: int, hidden: int, **changes) -> EncoderShape:
    return EncoderShape("bert", 6, hidden, heads, 4 * hidden, 100, 64, **changes)


def taps(heads: int, size: int, seed: int) -> Taps:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, heads, 6, size, generator=generator) for _ in range(3))
    return Taps(q, k, v)


def mask() -> torch.Tensor:
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[0, 4:] = False
    valid[2] = False
    return valid


def test_minilm_is_attention_and_value_with_equal_weights():
    objective = Objective.named("minilm")
    teacher, student = taps(4, 8, 0), taps(4, 5, 1)
    sums = objective.term_sums(teacher, student, mask())
    assert objective.names == ("attention", "value")
    assert objective.weights.tolist() == [1.0, 1.0]
    loss = (objective.weights * sums).sum() / objective.count(mask(), (3, 6))
    attention = relation_kl(teacher.q, teacher.k, student.q, student.k, mask())
    value = relation_kl(teacher.v, teacher.v, student.v, student.v, mask())
    torch.testing.assert_close(loss, attention + value)


def test_minilmv2_compares_sides_with_different_heads():
    objective = Objective.named("minilmv2", relation_heads=2)
    teacher, student = taps(4, 8, 0), taps(3, 4, 1)
    sums = objective.term_sums(teacher, student, mask())
    assert objective.names == ("query", "key", "value")
    for i, part in enumerate("qkv"):
        t, s = (relation_heads(getattr(side, part), 2) for side in (teacher, student))
        torch.testing.assert_close(sums[i], relation_kl(t, t, s, s, mask(), reduction="sequence_sum"))


def test_any_weighted_pairs():
    objective = Objective((Relation("a", "q", "v", 0.5), Relation("b", "k", "q", 2.0)))
    teacher, student = taps(2, 4, 0), taps(2, 4, 1)
    sums = objective.term_sums(teacher, student, None)
    expected = relation_kl(teacher.k, teacher.q, student.k, student.q, None) * 3
    torch.testing.assert_close(sums[1], expected)
    assert objective.weights.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_gradients_do_not_depend_on_how_a_batch_is_split(reduction):
    """Checked on gradients, as an SGD step would use them: Adam hides a wrong scale."""
    objective = Objective.named("minilm", reduction=reduction)
    teacher = taps(2, 4, 0)
    gradients = []
    for pieces in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        student = Taps(*(part.requires_grad_() for part in taps(2, 4, 1)[:3]))
        count = sum(objective.count(mask()[piece], mask()[piece].shape) for piece in pieces)
        for piece in pieces:
            parts = [Taps(*(part[piece] for part in side[:3])) for side in (teacher, student)]
            (objective.weights * objective.term_sums(*parts, mask()[piece])).sum().div(count).backward()
        gradients.append([part.grad for part in student[:3]])
    for whole, split in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-8)


def test_count_without_a_mask():
    assert Objective.named("minilm").count(None, (3, 6)).item() == 3
    assert Objective.named("minilm", reduction="token").count(None, (3, 6)).item() == 18
    assert Objective.named("minilm", reduction="token").count(mask(), (3, 6)).item() == 10


def test_a_position_bias_belongs_to_attention_only():
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    teacher, student = taps(2, 4, 0), taps(2, 4, 1)
    objective = Objective.named("minilm")
    plain, biased = (
        objective.term_sums(side, student, mask()) for side in (teacher, teacher._replace(bias=bias))
    )
    expected = relation_kl(
        teacher.q, teacher.k, student.q, student.k, mask(), reduction="sequence_sum", teacher_bias=bias
    )
    torch.testing.assert_close(biased[0], expected)
    assert biased[0] != plain[0] and biased[1] == plain[1]
    with pytest.raises(
        ModelError, match=r"^4 relation heads cannot carry a position bias made for 2 heads; leave"
    ):
        Objective.named("minilm", relation_heads=4).term_sums(teacher._replace(bias=bias), student, mask())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Objective.named("minilm3"),
            "objective 'minilm3' is not known; use one of minilm, minilmv2, attention-only, value-mse,"
            " layer-to-layer, soft-label-mlm, embedding, hidden-relation",
        ),
        (lambda: Relation("a", "q", "w"), "relation 'a' is made of 'w'; use q, k, v, hidden"),
        (
            lambda: Objective((Relation("a", "q", "k"), Relation("a", "v", "v"))),
            "an objective needs one relation or more, each with a name of its own, not ['a', 'a']",
        ),
        (
            lambda: Objective.named("minilm", reduction="mean"),
            'reduction \'mean\' is not known; use "sequence" or "token"',
        ),
        (
            lambda: Objective.named("minilm").check(shape(12, 768), shape(6, 384)),
            "the teacher has 12 heads and the student 6; give both the same number,"
            " or set relation_heads to divide 768 and 384",
        ),
        (
            lambda: Objective.named("minilmv2", relation_heads=50).check(shape(12, 768), shape(12, 384)),
            "50 relation heads do not divide the teacher's hidden size 768; give a divisor of 384",
        ),
    ],
)
def test_objectives_that_do_not_fit(make, message):
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value) == message


# ---- The paper's ablation arms, and terms by head. ----


def padded(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~mask()[:, None, :, None], float("nan"))


def test_value_mse_is_the_mean_over_valid_tokens_whatever_stands_in_the_padding():
    objective = Objective.named("value-mse")
    teacher, student = taps(2, 4, 0), taps(2, 4, 1)
    got = objective.term_sums(
        teacher._replace(v=padded(teacher.v)), student._replace(v=padded(student.v)), mask()
    )
    expected = 0.0
    for row in range(2):  # row 2 has no valid token
        valid = mask()[row]
        difference = (teacher.v - student.v)[row][:, valid]
        expected += difference.square().mean().item()
    assert got[1].item() == pytest.approx(expected, rel=1e-5)
    attention = Objective.named("attention-only").term_sums(teacher, student, mask())
    assert torch.equal(attention, got[:1])


def test_value_mse_projects_where_sizes_differ_and_starts_the_same_every_time():
    objective = Objective.named("value-mse")
    assert objective.projections(8, 8) == {}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again = objective.projections(8, 6), objective.projections(8, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["value"].weight, again["value"].weight) and first["value"].weight.shape == (8, 6)
    teacher, student = taps(2, 4, 0), taps(2, 3, 1)
    sums = objective.term_sums(teacher, student, None, first)
    concatenated = [side.v.transpose(1, 2).reshape(3, 6, -1) for side in (teacher, student)]
    expected = (concatenated[1] @ first["value"].weight.T - concatenated[0]).square().mean() * 3
    torch.testing.assert_close(sums[1], expected)
    sums.sum().backward()
    assert first["value"].weight.grad.abs().sum() > 0


def test_layer_to_layer_averages_over_layers():
    teacher, student = taps(2, 4, 0), taps(2, 4, 1)
    deep = [side._replace(earlier=(taps(2, 4, seed),)) for side, seed in ((teacher, 2), (student, 3))]
    sums = Objective.named("layer-to-layer").term_sums(*deep, mask())
    minilm = Objective.named("minilm")
    last, first = (
        minilm.term_sums(teacher, student, mask()),
        minilm.term_sums(*(d.earlier[0] for d in deep), mask()),
    )
    torch.testing.assert_close(sums, (last + first) / 2)


def test_hidden_relation_splits_hidden_states_into_heads():
    teacher, student = taps(2, 4, 0), taps(2, 3, 1)
    generator = torch.Generator().manual_seed(4)
    hidden = [torch.randn(3, 6, size, generator=generator) for size in (8, 6)]
    objective = Objective.named("hidden-relation")
    sums = objective.term_sums(teacher._replace(hidden=hidden[0]), student._replace(hidden=hidden[1]), mask())
    t, s = (h.view(3, 6, 2, -1).transpose(1, 2) for h in hidden)
    torch.testing.assert_close(sums[1], relation_kl(t, t, s, s, mask(), reduction="sequence_sum"))
    assert "hidden" in objective.fields and Objective.named("minilm").fields == {"q", "k", "v", "bias"}


@pytest.mark.parametrize("name", ["minilm", "minilmv2", "layer-to-layer", "value-mse"])
def test_heads_average_to_their_term(name):
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    objective = Objective.named(name, reduction="token")
    teacher, student = taps(2, 4, 0)._replace(bias=bias), taps(2, 4, 1)
    student.q.requires_grad_()
    if name == "layer-to-layer":
        teacher, student = (
            teacher._replace(earlier=(taps(2, 4, 2),)),
            student._replace(earlier=(taps(2, 4, 3),)),
        )
    by_head = objective.head_sums(teacher, student, mask())
    sums = dict(zip(objective.names, objective.term_sums(teacher, student, mask()), strict=True))
    assert by_head.shape == (len(objective.relation_names), 2) and not by_head.requires_grad
    assert set(objective.names) - set(objective.relation_names) == (
        {"value"} if name == "value-mse" else set()
    )
    for term, heads in zip(objective.relation_names, by_head, strict=True):
        assert heads[0] != heads[1]
        torch.testing.assert_close(heads.mean(), sums[term])


def test_from_plain_values():
    objective = Objective.named(
        relations=[
            {"name": "a", "x": "q", "y": "k", "weight": 2.0},
            {"name": "b", "term": "squared_error", "field": "v"},
        ],
        reduction="token",
    )
    assert objective.names == ("a", "b") and objective.weights.tolist() == [2.0, 1.0]
    assert Objective.named("minilmv2", relation_heads=48, reduction="sequence").relation_heads == 48
    with pytest.raises(ModelError, match=r"^an objective has no 'head'; use name, relations, reduction, "):
        Objective.named("minilm", head=3)
    with pytest.raises(
        ModelError, match=r"^relation \{'name': 'a', 'x': 'q'\} does not fit; use name, x, y, weight$"
    ):
        Objective.named(relations=[{"name": "a", "x": "q"}])
