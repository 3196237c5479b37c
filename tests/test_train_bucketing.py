"""Rows of several lengths: every row once, gradients as of each alone.

That the bits are the same for any worker count is in test_worker_two_workers.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from minilm.data.read.reader import RowReader
from minilm.model.distiller import Distiller
from minilm.model.encoder import attention
from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.sentence_head import SentenceHead
from minilm.model.encoder.sentence_layout import POOLINGS, DenseLayer, SentenceLayout
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.objective import Objective
from minilm.orchestrator.evaluation.probes.evaluator import HeldOutPass, make_evaluators, measure
from minilm.orchestrator.feed.corpora import HeldOut, open_stream
from minilm.orchestrator.train import step as step_module
from minilm.orchestrator.train.bucketing import LEAST_GAIN, ROUND, by_length, end_to_end, group_widths
from minilm.orchestrator.train.build import build_distiller
from tests.support import make_spec
from tests.test_model_encoder import tiny_config
from tests.test_train_step import ALONE, one_step


def padded(lengths, tokens=512, pad=1, seed=0):
    """Random ids behind `lengths` of which padding follows."""
    ids = torch.randint(4, 50, (len(lengths), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, pad), mask


def test_every_row_is_in_one_group_whole_but_for_its_padding():
    generator = torch.Generator().manual_seed(0)
    for case in range(30):
        lengths = torch.randint(0, 513, (1 + case,), generator=generator).tolist()
        ids, mask = padded(lengths, seed=case)
        groups = by_length(ids, mask)
        assert [g[0].shape[1] for g in groups] == sorted({g[0].shape[1] for g in groups}, reverse=True)
        rows = []
        for part_ids, part_mask in groups:
            width = part_ids.shape[1]
            assert width % ROUND == 0
            valid = torch.ones_like(part_ids, dtype=torch.bool) if part_mask is None else part_mask
            assert part_mask is None or not part_mask.all()
            rows += [tuple(row[own].tolist()) for row, own in zip(part_ids, valid, strict=True)]
        assert sorted(rows) == sorted(tuple(row[own].tolist()) for row, own in zip(ids, mask, strict=True))


def test_a_row_without_padding_takes_the_path_without_masks():
    ids, mask = padded([512, 40, 512, 60])
    (whole, whole_mask), (short, short_mask) = by_length(ids, mask)
    assert torch.equal(whole, ids[[0, 2]]) and whole_mask is None
    assert torch.equal(short, ids[[1, 3], :64]) and torch.equal(short_mask, mask[[1, 3], :64])
    ((same, none),) = by_length(ids, None)
    assert same is ids and none is None


def test_padding_in_front_or_between_is_never_cut():
    ids, mask = padded([0, 0, 0])
    mask[0, 100:] = True  # in front
    mask[1, [3, 511]] = True  # between
    mask[2, 5:30] = True
    (long, long_mask), (short, short_mask) = by_length(ids, mask)
    assert torch.equal(long, ids[:2]) and torch.equal(long_mask, mask[:2])
    assert torch.equal(short, ids[2:, :32]) and torch.equal(short_mask, mask[2:, :32])


def test_the_cuts_are_the_cheapest():
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        sizes = sorted({32 * int(n) for n in torch.randint(1, 17, (6,), generator=generator)})
        counts = torch.randint(1, 9, (len(sizes),), generator=generator).tolist()
        group_cost = 0.1 * sum(counts) * 512

        def cost(chosen, sizes=sizes, counts=counts, group_cost=group_cost):
            widths = [min(c for c in chosen if c >= size) for size in sizes]
            return sum(n * w for n, w in zip(counts, widths, strict=True)) + group_cost * len(chosen)

        every = [
            (*some, sizes[-1])
            for size in range(len(sizes))
            for some in itertools.combinations(sizes[:-1], size)
        ]
        assert cost(group_widths(sizes, counts, group_cost)) == min(map(cost, every))


def test_one_more_group_must_save_a_tenth():
    assert LEAST_GAIN == 0.1
    for rows, groups in ((1, 1), (3, 2)):  # of 10 rows that many have half the length: 5 % and 15 % saved
        assert len(by_length(*padded([256] * rows + [512] * (10 - rows)))) == groups


# ---- The same sums and gradients: rows, weights and positions are what they were. ----

OBJECTIVES = {
    "minilm": {},
    "value-mse": {"reduction": "token"},
    "hidden-relation": {},
    "soft-label-mlm": {"mask_token_id": 49, "special_ids": (1,)},
}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("roberta", name) for name in OBJECTIVES] + [("bert", "minilm"), ("modernbert", "minilm"), ("mpnet", "minilm")],
)  # fmt: skip
def test_groups_give_the_gradient_of_the_whole(architecture, name):
    config = tiny_config(architecture, max_position_embeddings=200)
    objective = Objective.named(name, **OBJECTIVES[name])
    made = [
        TappedEncoder(
            build_student(config, layers=2, hidden=h, dropout=0.0, seed=s, head=objective.needs_head), 2
        )
        for s, h in enumerate((24, 16))
    ]
    for parameter in itertools.chain(*(encoder.parameters() for encoder in made)):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    distiller = Distiller(made[0], {"s": made[1]}, objective).double()
    ids, mask = padded([128, 20, 33, 0, 128, 31], tokens=128)
    results = []
    layouts = [[(ids, mask)], by_length(ids, mask)]
    if objective.takes_blocks:
        layouts.append([end_to_end(ids, mask)])
    for groups in layouts:
        sums = [distiller.term_sums("s", distiller.teacher_forward(*group), *group) for group in groups]
        total = torch.stack(sums).sum(0)
        parameters = list(distiller.trained_parameters("s").values())
        gradients = torch.autograd.grad((total * distiller.weights).sum(), parameters)
        results.append((len(groups), total.detach(), torch.cat([g.flatten() for g in gradients])))
    (_, whole, whole_gradient), (several, *_) = results[:2]
    assert several == 2
    for _, cut, cut_gradient in results[1:]:
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            cut_gradient, whole_gradient, rtol=0, atol=1e-12 * whole_gradient.abs().max()
        )


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_documents_end_to_end_are_computed_as_if_each_were_alone(architecture, vectors):
    config = tiny_config(architecture, max_position_embeddings=200)
    made = [
        TappedEncoder(build_student(config, layers=2, hidden=h, dropout=0.0, seed=s), 2)
        for s, h in enumerate((24, 16))
    ]
    for parameter in itertools.chain(*(encoder.parameters() for encoder in made)):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    name = "minilm" if architecture == "modernbert" else "layer-to-layer"  # it has a layer with a window
    if vectors:
        name, pooling = "embedding", POOLINGS[sorted(FAMILIES).index(architecture) % len(POOLINGS)]
        for encoder, own in zip(made, ((), (DenseLayer(16, 24),)), strict=True):
            encoder.head = SentenceHead(SentenceLayout(pooling, own))
    distiller = Distiller(made[0], {"s": made[1]}, Objective.named(name))
    distiller = distiller if vectors else distiller.double()  # pooling is float32 in any case
    ids, mask = padded([31, 7, 12, 7, 64, 1], tokens=64)
    ids[0, 5] = 1  # the padding id in a text: it has no position in some families
    parameters = list(distiller.trained_parameters("s").values())

    def computed(*layouts):
        heads = torch.zeros(distiller.head_shape, dtype=torch.float64)
        wanted = None if vectors else heads
        total = torch.stack(
            [distiller.term_sums("s", distiller.teacher_forward(*one), *one, heads=wanted) for one in layouts]
        ).sum(0)
        gradients = torch.autograd.grad((total * distiller.weights).sum(), parameters)
        return total.detach(), heads, torch.cat([gradient.flatten() for gradient in gradients])

    found = computed(end_to_end(ids, mask))
    alone = computed(*((row[own][None], None) for row, own in zip(ids, mask, strict=True)))
    for one, other in zip(found, alone, strict=True):
        digits, most = 1e-4 if vectors else 1e-11, max(other.abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(one, other, rtol=digits, atol=digits / 10 * most)


@pytest.mark.parametrize(
    "dropout", [0.0, 1e-9]
)  # by PyTorch's attention, and by ours, which drops nothing then
@pytest.mark.parametrize("architecture", ["bert", "mpnet", "modernbert"])
def test_in_bfloat16_documents_end_to_end_have_the_same_values_in_few_shapes(
    architecture, dropout, monkeypatch
):
    """A CPU's kernels for bfloat16 are compiled for each shape. Against rows of their own in float32."""
    config = tiny_config(architecture, max_position_embeddings=200)
    encoder = TappedEncoder(build_student(config, layers=2, hidden=24, dropout=dropout, seed=0), 2)
    parameters = list(encoder.trained_parameters().values())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    lengths = [31, 7, 32, 7, 64, 1]
    ids, mask = padded(lengths, tokens=64)
    sequence, blocks = end_to_end(ids, mask, few_lengths=True)
    assert sequence.shape[1] == 144 and sum(lengths) == 142

    def value_and_gradient(parts):
        total = sum(side.float().square().sum() for taps in parts for side in (taps.q, taps.k, taps.v))
        return total.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    shapes, own = set(), attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *a, **k: shapes.add(a[1].shape) or own(*a, **k))
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(encoder(sequence, blocks).split(blocks))
    assert {shape[2] for shape in shapes} == {32, 64}
    assert not dropout or {shape[0] for shape in shapes} == {1}
    alone = (encoder(row[own][None]) for row, own in zip(ids, mask, strict=True))
    wanted, wanted_gradient = value_and_gradient(alone)
    torch.testing.assert_close(value, wanted, rtol=0.02, atol=0)
    assert (gradient - wanted_gradient).norm() < 0.05 * wanted_gradient.norm()


def step_with_shapes(spec, monkeypatch):
    distiller = build_distiller(spec, ALONE.device)
    teacher_forward, shapes = distiller.teacher_forward, []
    monkeypatch.setattr(
        distiller, "teacher_forward", lambda ids, mask: shapes.append(ids.shape) or teacher_forward(ids, mask)
    )
    return (*one_step(spec, distiller=distiller)[1:], shapes)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_computes_fewer_tokens_and_moves_the_weights_alike(
    documents, teacher, tmp_path, monkeypatch, grouped
):
    spec = make_spec(documents, teacher, tmp_path, dropout=0.0)
    if grouped:  # as on a GPU
        monkeypatch.setattr(step_module, "end_to_end", lambda ids, mask, **_: None)
    (state,), outcome, shapes = step_with_shapes(spec, monkeypatch)
    stream = open_stream(spec.data, seed=spec.seed, batch=spec.batch, micro_batch=spec.batch)
    valid = int(stream.micro_batch(0, 0).mask.sum())
    computed = sum(rows * width for rows, width in shapes)
    if not grouped:
        assert computed == valid and [rows for rows, _ in shapes] == [1] * (spec.batch // spec.micro_batch)
    else:
        assert valid < computed < 0.9 * 8 * 64 and sum(rows for rows, _ in shapes) == 8
    monkeypatch.setattr(step_module, "by_length", lambda ids, mask: [(ids, mask)])
    monkeypatch.setattr(step_module, "end_to_end", lambda ids, mask, **_: None)
    _, (plain,), expected = one_step(spec)
    torch.testing.assert_close(state.gradient, plain.gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(outcome.terms, expected.terms, rtol=1e-5, atol=0)
    assert outcome.count == expected.count


@pytest.mark.parametrize("grouped", [False, True])
def test_all_that_is_computed_at_a_time_has_a_dropout_mask_of_its_own(
    documents, teacher, tmp_path, monkeypatch, grouped
):
    spec = make_spec(documents, teacher, tmp_path)
    if grouped:
        monkeypatch.setattr(step_module, "end_to_end", lambda ids, mask, **_: None)
    distiller = build_distiller(spec, ALONE.device)
    term_sums, seeds = distiller.term_sums, []

    def noting(*arguments, dropout_seed, **rest):
        seeds.append(dropout_seed)
        return term_sums(*arguments, dropout_seed=dropout_seed, **rest)

    monkeypatch.setattr(distiller, "term_sums", noting)
    for _ in range(2):  # the same ones again when the step is computed again
        one_step(spec, distiller=distiller)
    first, again = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]
    assert first == again and len(set(first)) == len(first) >= spec.batch // spec.micro_batch


def test_rows_that_cannot_lie_end_to_end():
    ids, mask = padded([5, 0, 9, 5])
    sequence, blocks = end_to_end(ids, mask)
    assert blocks == ((1, 9), (2, 5)) and sequence.tolist() == [
        [*ids[2, :9].tolist(), *ids[0, :5].tolist(), *ids[3, :5].tolist()]
    ]
    assert end_to_end(ids, torch.zeros_like(mask)) is None
    mask[1, 100:] = True  # padding in front
    assert end_to_end(ids, mask) is None


def test_held_out_rows_give_the_same_divergence(documents, teacher, tmp_path, monkeypatch):
    spec = make_spec(documents, teacher, tmp_path)
    distiller = build_distiller(spec, ALONE.device)
    held_out = [HeldOut("only", 1.0, RowReader(documents / "held-out"))]
    values = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(
                "minilm.orchestrator.evaluation.probes.evaluator.by_length", lambda ids, mask: [(ids, mask)]
            )
        given = HeldOutPass(distiller, held_out, rows=12, micro_batch=6, autocast=None, world=ALONE)
        values.append(measure(make_evaluators(spec), given))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_out_of_memory_halves_every_micro_batch(documents, teacher, tmp_path, monkeypatch, grouped):
    spec = make_spec(documents, teacher, tmp_path, dropout=0.0)
    if grouped:
        monkeypatch.setattr(step_module, "end_to_end", lambda ids, mask, **_: None)
    _, (expected,), _ = one_step(spec)
    distiller = build_distiller(spec, ALONE.device)
    teacher_forward, sizes = distiller.teacher_forward, []

    def small_memory(ids, mask):
        sizes.append(ids.numel())
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("not enough")
        return teacher_forward(ids, mask)

    monkeypatch.setattr(distiller, "teacher_forward", small_memory)
    _, (state,), outcome = one_step(spec, distiller=distiller)
    assert outcome.num_chunks == 2
    assert max(sizes[2:]) < max(sizes[:2])
    torch.testing.assert_close(state.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
