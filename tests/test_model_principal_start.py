"""A narrower student whose states start as projections of its teacher's: which directions, weights and norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES, PLAIN
from minilm.model.encoder.initialize import from_teacher
from minilm.model.encoder.principal_start import (
    from_principal_directions,
    principal_directions,
    student_directions,
)
from minilm.model.errors import ModelError
from tests.test_model_initialize import build

HIDDEN, NARROW = 32, 16


def rows(count=3, tokens=12):
    """Batches with padding, the last without."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(5, 30, (4, tokens), generator=generator)
        mask = torch.arange(tokens) < torch.tensor([tokens, 5, 9, 1])[:, None]
        found.append((ids, mask if number < count - 1 else None))
    return found


def along_few(model):
    """The model with larger weights, and states that vary along a few directions, oblique to the dimensions."""
    generator = torch.Generator().manual_seed(1)
    oblique = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
    narrow = oblique * 0.8 ** torch.arange(HIDDEN) @ oblique.T
    family = FAMILIES[model.config.model_type]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = 1.0 if "embed" in name else 0.1
            weight += size * torch.randn(weight.shape, generator=generator) * (weight.dim() > 1)
            writes = family.blocks(name.rpartition(".")[0]).rows == (PLAIN,)
            if weight.dim() > 1 and weight.shape[0] == HIDDEN and writes:
                weight.copy_(narrow @ weight)
            elif weight.shape[-1] == HIDDEN and "embed" in name and weight.dim() > 1:
                weight.copy_(weight @ narrow)
    return model.eval()


def pair(kind="bert", layers=2, hidden=NARROW, **changes):
    return along_few(build(kind, layers=4, hidden=HIDDEN)), build(
        kind, layers=layers, hidden=hidden, seed=1, **changes
    )


def test_the_directions_are_those_of_the_largest_second_moments_of_valid_tokens():
    teacher, _ = pair()
    found = principal_directions(teacher, rows(), [2, 4], NARROW)
    torch.testing.assert_close(found.T @ found, torch.eye(NARROW), atol=1e-5, rtol=0)
    moments = []
    for layer in (0, 2, 4):
        valid = []
        for ids, mask in rows():
            mask = torch.ones_like(ids).bool() if mask is None else mask
            with torch.no_grad():
                states = teacher(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
            valid.append(states[layer][mask].double().numpy())
        one = np.concatenate(valid)
        moments.append(one.T @ one / (one**2).sum())
    values = np.linalg.svd(sum(moments))[1]
    kept = found.double().numpy()
    assert np.trace(kept.T @ sum(moments) @ kept) == pytest.approx(values[:NARROW].sum(), rel=1e-5)
    changed = [(ids if mask is None else torch.where(mask, ids, 7), mask) for ids, mask in rows()]
    assert torch.equal(principal_directions(teacher, changed, [2, 4], NARROW), found)


def test_states_have_sum_zero_where_a_layer_norm_takes_the_mean_away():
    teacher, student = pair()
    p = student_directions(student, teacher, rows())
    torch.testing.assert_close(p.sum(dim=1), torch.zeros(HIDDEN), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(p) == NARROW - 1
    teacher, student = pair("eurobert")  # whose norms take nothing away
    p = student_directions(student, teacher, rows())
    torch.testing.assert_close(p.T @ p, torch.eye(NARROW), atol=1e-5, rtol=0)


def test_what_reads_states_and_what_writes_them_is_projected():
    teacher, student = pair()
    from_principal_directions(student, teacher, rows())
    p = student_directions(student, teacher, rows())
    torch.testing.assert_close(
        student.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight @ p
    )
    mine, theirs = student.encoder.layer[0], teacher.encoder.layer[1]
    head = [8 * head + i for head in range(4) for i in range(4)]
    for got, expected in (
        (mine.attention.self.query.weight, theirs.attention.self.query.weight[head] @ p),
        (mine.attention.self.value.bias, theirs.attention.self.value.bias[head]),
        (mine.attention.output.dense.weight, p.T @ theirs.attention.output.dense.weight[:, head]),
        (mine.attention.output.dense.bias, p.T @ theirs.attention.output.dense.bias),
        (mine.intermediate.dense.weight, theirs.intermediate.dense.weight[:64] @ p),
        (mine.output.dense.weight, p.T @ theirs.output.dense.weight[:, :64]),
        (student.pooler.dense.weight, p.T @ teacher.pooler.dense.weight @ p),
    ):
        torch.testing.assert_close(got, expected)


def test_a_norm_is_the_least_squares_fit_of_the_teachers():
    teacher, student = pair()
    from_principal_directions(student, teacher, rows())
    p = student_directions(student, teacher, rows())
    norm, other, seen = (
        student.encoder.layer[1].output.LayerNorm,
        teacher.encoder.layer[3].output.LayerNorm,
        [],
    )
    other.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    x, y = [], []
    for ids, mask in rows():
        with torch.no_grad():
            teacher(ids, attention_mask=None if mask is None else mask.long())
        valid = torch.ones_like(ids).bool() if mask is None else mask
        x.append(torch.layer_norm(seen[-1][0][valid] @ p, (NARROW,), eps=norm.eps))
        y.append(seen[-1][1][valid] @ p)
    x, y = torch.cat(x).detach().double().numpy(), torch.cat(y).detach().double().numpy()
    for dim in range(NARROW):
        slope, shift = np.polyfit(x[:, dim], y[:, dim], 1)
        assert norm.weight[dim].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)
        assert norm.bias[dim].item() == pytest.approx(shift, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_starts_nearer_to_its_teacher_than_by_leading_dimensions(kind):
    """Nearer: the similarities of tokens' states, which do not depend on the directions that a model has them in."""
    teacher, student = pair(kind, layers=4)
    _, sliced = pair(kind, layers=4)
    from_principal_directions(student, teacher, rows())
    from_teacher(sliced, teacher)
    ids, mask = rows()[0]

    def similarities(model):
        with torch.no_grad():
            states = model.eval()(ids, attention_mask=mask.long()).last_hidden_state[mask]
        states = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
        return states @ states.T

    expected = similarities(teacher)
    near, far = (float((similarities(model) - expected).square().mean()) for model in (student, sliced))
    assert near < 0.6 * far


def test_the_same_rows_give_the_same_bits_and_an_equal_width_the_teachers_own():
    teacher, student = pair()
    _, again = pair()
    for model in (student, again):
        from_principal_directions(model, teacher, rows())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    _, wide = pair(hidden=HIDDEN)
    _, layers = pair(hidden=HIDDEN)
    from_principal_directions(wide, teacher, rows())
    from_teacher(layers, teacher)
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), layers.parameters(), strict=True))


def test_a_feed_forward_part_as_wide_as_the_states_is_refused():
    config = AutoConfig.for_model("bert", vocab_size=30, max_position_embeddings=20)
    teacher = build_student(config, layers=2, hidden=32, heads=4, ffn=32, seed=0)
    student = build_student(config, layers=2, hidden=16, heads=4, ffn=16, seed=0)
    with pytest.raises(ModelError) as caught:
        from_principal_directions(student, teacher, rows())
    assert str(caught.value) == (
        "teacher-pca can't tell a feed-forward size of 16 from the hidden size, which is the same; give the student "
        "another ffn, or init: teacher-layers"
    )
