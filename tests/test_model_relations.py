"""The divergence against a float64 triple loop, against calculus, and against formulas that got it wrong."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from minilm.model.errors import ModelError
from minilm.model.loss.relations import relation_heads, relation_kl, relation_weight

BATCH, HEADS, TOKENS, TEACHER_SIZE, STUDENT_SIZE = 4, 3, 7, 8, 5


def ragged_mask() -> Tensor:
    """Right, left and middle padding, and a row of padding only."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :3] = False
    mask[2, [1, 4]] = False
    mask[3] = False
    return mask


def sides(dtype=torch.float64, tokens=TOKENS, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (TEACHER_SIZE, TEACHER_SIZE, STUDENT_SIZE, STUDENT_SIZE)
    return tuple(  # type: ignore[return-value]
        torch.randn(BATCH, HEADS, tokens, size, generator=generator, dtype=torch.float64).to(dtype) * 1.5
        for size in sizes
    )


def loop_kl(tx, ty, sx, sy, mask, reduction="sequence", teacher_bias=None, student_bias=None) -> float:
    """Equation by equation in plain Python floats: the truth the tensors are held against."""
    tx, ty, sx, sy = (side.detach().double().tolist() for side in (tx, ty, sx, sy))
    batch, heads, tokens = len(tx), len(tx[0]), len(tx[0][0])

    def row(x, y, keys, bias):
        scores = [
            sum(a * b for a, b in zip(x, y[j], strict=True)) / math.sqrt(len(x)) + bias(j) for j in keys
        ]
        top = max(scores)
        total = sum(math.exp(score - top) for score in scores)
        return [math.exp(score - top) / total for score in scores]

    def bias_of(bias, b, h, i):
        if bias is None:
            return lambda j: 0.0
        full = bias.expand(batch, heads, tokens, tokens)
        return lambda j: float(full[b, h, i, j])

    sequences, all_rows = [], []
    for b in range(batch):
        keys = [j for j in range(tokens) if mask is None or mask[b, j]]
        if not keys:
            continue
        rows = []
        for i in keys:
            over_heads = 0.0
            for h in range(heads):
                p = row(tx[b][h][i], ty[b][h], keys, bias_of(teacher_bias, b, h, i))
                q = row(sx[b][h][i], sy[b][h], keys, bias_of(student_bias, b, h, i))
                over_heads += sum(a * (math.log(a) - math.log(c)) for a, c in zip(p, q, strict=True))
            rows.append(over_heads / heads)
        sequences.append(sum(rows) / len(rows))
        all_rows += rows
    chosen = sequences if reduction.startswith("sequence") else all_rows
    return sum(chosen) if reduction.endswith("_sum") else sum(chosen) / len(chosen)


BOTH = pytest.mark.parametrize("implementation", ["reference", "tiled"])


@BOTH
@pytest.mark.parametrize("reduction", ["sequence", "token", "sequence_sum", "token_sum"])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_the_triple_loop(reduction, padded, implementation):
    mask = ragged_mask() if padded else None
    got = relation_kl(*sides(), mask, reduction=reduction, implementation=implementation)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(loop_kl(*sides(), mask, reduction), rel=1e-12)


@BOTH
def test_bias_is_added_to_the_scaled_scores_of_its_side(implementation):
    generator = torch.Generator().manual_seed(1)
    teacher_bias = torch.randn(1, HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    student_bias = torch.randn(TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    for biases in ({"teacher_bias": teacher_bias}, {"student_bias": student_bias}):
        got = relation_kl(*sides(), ragged_mask(), **biases, implementation=implementation)
        assert got.item() == pytest.approx(loop_kl(*sides(), ragged_mask(), **biases), rel=1e-12)


def test_is_zero_for_equal_relations_and_positive_otherwise():
    teacher_x, teacher_y, *_ = sides(torch.float32)
    assert relation_kl(teacher_x, teacher_y, teacher_x, teacher_y, ragged_mask()).item() == 0.0
    for seed in range(5):
        assert relation_kl(*sides(seed=seed), ragged_mask()).item() > 0.01


@BOTH
def test_padding_changes_nothing_whatever_stands_there(implementation):
    mask = ragged_mask()
    clean = relation_kl(*sides(), mask, implementation=implementation)
    for junk in (1e4, math.inf, math.nan):
        dirty = [side.masked_fill(~mask[:, None, :, None], junk).requires_grad_() for side in sides()]
        got = relation_kl(*dirty, mask, implementation=implementation)
        assert torch.equal(got, clean)
        got.backward()
        for side in dirty[2:]:
            assert torch.count_nonzero(side.grad * ~mask[:, None, :, None]) == 0
            assert side.grad.isfinite().all()


def test_removing_the_padding_gives_the_same_divergence_whatever_its_layout():
    mask = ragged_mask()
    by_hand = [
        relation_kl(*(side[b : b + 1, :, mask[b]] for side in sides()), None).item() for b in range(BATCH - 1)
    ]
    assert relation_kl(*sides(), mask).item() == pytest.approx(sum(by_hand) / 3, rel=1e-12)


def test_batch_order_and_split_do_not_matter():
    mask, order = ragged_mask(), torch.tensor([2, 0, 3, 1])
    whole = relation_kl(*sides(), mask)
    shuffled = relation_kl(*(side[order] for side in sides()), mask[order])
    assert shuffled.item() == pytest.approx(whole.item(), rel=1e-12)
    halves = [slice(0, 1), slice(1, 4)]
    for reduction in ("sequence", "token"):
        total = sum(
            relation_kl(*(s[h] for s in sides()), mask[h], reduction=f"{reduction}_sum") for h in halves
        )
        count = sum(relation_weight(mask[h], reduction) for h in halves)
        expected = relation_kl(*sides(), mask, reduction=reduction).item()
        assert (total / count).item() == pytest.approx(expected, rel=1e-12)


def test_only_the_student_gets_a_gradient():
    tensors = [side.requires_grad_() for side in sides()]
    relation_kl(*tensors, ragged_mask()).backward()
    assert [tensor.grad is not None for tensor in tensors] == [False, False, True, True]


@BOTH
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_gradcheck(reduction, implementation):
    teacher_x, teacher_y, student_x, student_y = sides()
    bias = torch.randn(1, HEADS, 1, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = ragged_mask()

    def loss(x, y, b):
        options = {"reduction": reduction, "student_bias": b, "implementation": implementation}
        return relation_kl(teacher_x, teacher_y, x, y, mask, **options)

    inputs = (student_x.requires_grad_(), student_y.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@BOTH
def test_a_batch_of_padding_only_is_zero_with_zero_gradient(implementation):
    tensors = [side.requires_grad_() for side in sides()]
    loss = relation_kl(*tensors, torch.zeros(BATCH, TOKENS, dtype=torch.bool), implementation=implementation)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(tensors[2].grad) == 0 and tensors[2].grad.isfinite().all()


def test_softmax_is_float32_for_bfloat16_inputs_and_under_autocast():
    low = sides(torch.bfloat16)
    expected = relation_kl(*(side.float() for side in low), ragged_mask())
    assert torch.equal(relation_kl(*low, ragged_mask()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = relation_kl(*sides(torch.float32), ragged_mask())
    assert got.dtype == torch.float32
    assert torch.equal(got, relation_kl(*sides(torch.float32), ragged_mask()))


def test_weight_is_an_exact_count():
    assert relation_weight(ragged_mask(), "sequence").item() == 3
    assert relation_weight(ragged_mask(), "token").item() == 5 + 4 + 5
    assert relation_weight((1 << 15, 1 << 10), "token").item() == 1 << 25  # not representable +1 in float32
    assert relation_weight((6, 9), "sequence_sum").item() == 6


def test_relation_heads_concatenates_then_splits():
    x = torch.arange(2 * 4 * 3 * 6, dtype=torch.float32).view(2, 4, 3, 6)
    split = relation_heads(x, 8)
    assert split.shape == (2, 8, 3, 3)
    concatenated = torch.cat(x.unbind(1), dim=-1)  # [batch, tokens, hidden]
    assert torch.equal(split, torch.stack(concatenated.split(3, dim=-1), dim=1))
    assert torch.equal(relation_heads(split, 4), x)
    with pytest.raises(
        ModelError, match=r"^5 relation heads do not divide 4 heads x 6 = 24; choose a divisor"
    ):
        relation_heads(x, 5)


# ---- Formulas that public implementations got wrong: each, written out, must differ from ours. ----


def log_maps(x, y, mask, scale=None):
    scores = x @ y.transpose(-1, -2) * (x.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask[:, None, None, :], -1e30).log_softmax(-1)


def right_padded():
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    for row, length in enumerate((7, 5, 3, 6)):
        mask[row, length:] = False
    return mask


def kl_rows(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)  # [batch, heads, queries]


def per_sequence(rows, mask):
    return ((rows.mean(1) * mask).sum(-1) / mask.sum(-1)).mean()


def wrong_double_softmax(tx, ty, sx, sy, mask):
    return per_sequence(kl_rows(log_maps(tx, ty, mask), log_maps(sx, sy, mask).exp().log_softmax(-1)), mask)


def wrong_divided_by_heads_twice(tx, ty, sx, sy, mask):
    return per_sequence(kl_rows(log_maps(tx, ty, mask), log_maps(sx, sy, mask)), mask) / HEADS


def wrong_padded_rows_averaged(tx, ty, sx, sy, mask):
    return kl_rows(log_maps(tx, ty, mask), log_maps(sx, sy, mask)).mean()


def wrong_padded_keys_in_the_normaliser(tx, ty, sx, sy, mask):
    everything = torch.ones_like(mask)
    return per_sequence(kl_rows(log_maps(tx, ty, everything), log_maps(sx, sy, everything)), mask)


def wrong_no_scale(tx, ty, sx, sy, mask):
    return per_sequence(kl_rows(log_maps(tx, ty, mask, 1.0), log_maps(sx, sy, mask, 1.0)), mask)


def wrong_reversed(tx, ty, sx, sy, mask):
    return per_sequence(kl_rows(log_maps(sx, sy, mask), log_maps(tx, ty, mask)), mask)


def wrong_cross_entropy(tx, ty, sx, sy, mask):
    log_p, log_q = log_maps(tx, ty, mask), log_maps(sx, sy, mask)
    return per_sequence(-(log_p.exp() * log_q).sum(-1), mask)


def wrong_log_of_softmax_plus_eps(tx, ty, sx, sy, mask):
    log_q = (torch.dropout(log_maps(sx, sy, mask).exp(), 0.1, True) + 1e-10).log()
    return per_sequence(kl_rows(log_maps(tx, ty, mask), log_q), mask)


def wrong_kl_div_loss_mean(tx, ty, sx, sy, mask):
    log_p, log_q = log_maps(tx, ty, mask), log_maps(sx, sy, mask)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="mean")


def wrong_kl_div_loss_batchmean(tx, ty, sx, sy, mask):
    log_p, log_q = log_maps(tx, ty, mask), log_maps(sx, sy, mask)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def wrong_tokens_and_heads_mixed(tx, ty, sx, sy, mask):
    mixed = [side.reshape(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for side in (tx, ty, sx, sy)]
    return per_sequence(kl_rows(log_maps(*mixed[:2], mask), log_maps(*mixed[2:], mask)), mask)


WRONG = [function for name, function in sorted(globals().items()) if name.startswith("wrong_")]


def gradients(loss, tensors, mask):
    """Of the student's two tensors, flattened."""
    student = [side.clone().requires_grad_() for side in tensors[2:]]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(*tensors[:2], *student, mask), student)])


def plain_formula(tx, ty, sx, sy, mask):
    return per_sequence(kl_rows(log_maps(tx, ty, mask), log_maps(sx, sy, mask)), mask)


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_ours_is_not_the_wrong_formula(wrong):
    """By its value and, but for the constant that cross-entropy adds, by its gradient."""
    torch.manual_seed(0)
    tensors, mask = sides(), right_padded()
    truth = loop_kl(*tensors, mask)
    assert abs(wrong(*tensors, mask).item() - truth) > 0.02 * truth
    right = gradients(plain_formula, tensors, mask)
    distance = (gradients(wrong, tensors, mask) - right).norm() / right.norm()
    assert distance < 1e-12 if wrong is wrong_cross_entropy else distance > 0.02
    for implementation in ("reference", "tiled"):
        ours = partial(relation_kl, implementation=implementation)
        assert ours(*tensors, mask).item() == pytest.approx(truth, rel=1e-12)
        torch.testing.assert_close(gradients(ours, tensors, mask), right, rtol=1e-9, atol=1e-12)


def test_dropout_before_the_logarithm_is_a_divergence_of_its_own():
    """At student = teacher the wrong formula is more than a nat, and is never driven to zero."""
    torch.manual_seed(0)
    tx, ty, *_ = sides()
    assert wrong_log_of_softmax_plus_eps(tx, ty, tx, ty, right_padded()) > 1.0
    assert relation_kl(tx, ty, tx, ty, right_padded()) == 0.0


def test_right_padding_is_not_assumed():
    """A loop over lengths that slices the first n tokens is right for right padding only."""
    tensors, mask = sides(), ragged_mask()[:3]
    tensors = [side[:3] for side in tensors]
    sliced = [
        relation_kl(*(s[b : b + 1, :, : int(mask[b].sum())] for s in tensors), None).item() for b in range(3)
    ]
    truth = loop_kl(*tensors, mask)
    assert abs(sum(sliced) / 3 - truth) > 0.02 * truth
    assert relation_kl(*tensors, mask).item() == pytest.approx(truth, rel=1e-12)


def test_minus_infinity_on_a_padded_sequence_would_be_nan():
    tx, ty, sx, sy = sides()
    scores = (tx @ ty.transpose(-1, -2)).masked_fill(~ragged_mask()[:, None, None, :], -math.inf)
    assert scores.softmax(-1).isnan().any()
    assert relation_kl(tx, ty, sx, sy, ragged_mask()).isfinite()


# ---- Bad input: one line that names the tensor, both shapes, and the way out. ----

GOOD = {
    "teacher_x": (2, 3, 4, 8),
    "teacher_y": (2, 3, 4, 8),
    "student_x": (2, 3, 4, 5),
    "student_y": (2, 3, 4, 5),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_x": (2, 6, 4, 5), "student_y": (2, 6, 4, 5)},
            "teacher_x [2, 3, 4, 8] and student_x [2, 6, 4, 5] differ in their head count: 3 and 6;"
            " re-split both with relation_heads",
        ),
        (
            {"student_x": (1, 3, 4, 5), "student_y": (1, 3, 4, 5)},
            "teacher_x [2, 3, 4, 8] and student_x [1, 3, 4, 5] differ in their batch count: 2 and 1",
        ),
        (
            {"student_y": (2, 3, 9, 5)},
            "student_x [2, 3, 4, 5] and student_y [2, 3, 9, 5] differ in their token count: 4 and 9",
        ),
        (
            {"teacher_y": (2, 3, 4, 7)},
            "teacher_x [2, 3, 4, 8] and teacher_y [2, 3, 4, 7] differ in their head-size count: 8 and 7",
        ),
        (
            {"student_x": (2, 4, 5)},
            "student_x has shape [2, 4, 5]; it must be [batch, heads, tokens, head size]",
        ),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    tensors = {name: torch.zeros(shape) for name, shape in (GOOD | changes).items()}
    with pytest.raises(ModelError) as caught:
        relation_kl(**tensors, mask=None)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mask": torch.ones(2, 4)},
            "mask is torch.float32; it must be torch.bool, True where a token is valid",
        ),
        (
            {"mask": torch.ones(2, 5, dtype=torch.bool)},
            "mask has shape [2, 5] but student_x [2, 3, 4, 5]; it must be [2, 4]",
        ),
        (
            {"teacher_x": torch.zeros(2, 3, 4, 8).double()},
            "teacher_x is torch.float64 but student_x torch.float32; cast to one dtype first",
        ),
        (
            {"teacher_bias": torch.zeros(2, 4, 4)},
            "teacher_bias has shape [2, 4, 4]; it must broadcast to [2, 3, 4, 4]",
        ),
        (
            {"reduction": "mean"},
            "reduction 'mean' is not known; use one of sequence, token, sequence_sum, token_sum",
        ),
        (
            {"student_y": torch.zeros(2, 3, 4, 5).long()},
            "student_y is torch.int64; relations need a floating-point dtype",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    call = {name: torch.zeros(shape) for name, shape in GOOD.items()} | {"mask": None} | arguments
    with pytest.raises(ModelError) as caught:
        relation_kl(**call)
    assert str(caught.value) == message
