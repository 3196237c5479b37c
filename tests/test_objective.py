"""Objectives as data: the papers' relations, weights, reductions, and terms that add up."""

import pytest
import torch

from model.errors import ModelError
from model.objective import Objective, Relation
from model.relations import relation_heads, relation_kl
from model.tap import Taps


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
        (lambda: Objective.named("minilm3"), "objective 'minilm3' is not known; use one of minilm, minilmv2"),
        (lambda: Relation("a", "q", "w"), "relation 'a' is made of 'w'; use q, k or v"),
        (
            lambda: Objective((Relation("a", "q", "k"), Relation("a", "v", "v"))),
            "an objective needs one relation or more, each with a name of its own, not ['a', 'a']",
        ),
        (
            lambda: Objective.named("minilm", reduction="mean"),
            'reduction \'mean\' is not known; use "sequence" or "token"',
        ),
        (
            lambda: Objective.named("minilm").check(12, 768, 6, 384),
            "the teacher has 12 heads and the student 6; give both the same number,"
            " or set relation_heads to divide 768 and 384",
        ),
        (
            lambda: Objective.named("minilmv2", relation_heads=50).check(12, 768, 12, 384),
            "50 relation heads do not divide the teacher's hidden size 768",
        ),
    ],
)
def test_objectives_that_do_not_fit(make, message):
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value) == message
