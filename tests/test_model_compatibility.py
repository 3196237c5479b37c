"""Teacher, student and objective against each other by their configs: what is refused, in which words."""

from dataclasses import replace

import pytest

from minilm.model.compatibility import check_teacher, fit_student
from minilm.model.encoder.shape import EncoderShape
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective

BERT = EncoderShape("bert", 6, 48, 4, 192, 100, 64)
MODERNBERT = replace(
    BERT,
    architecture="modernbert",
    ffn=72,
    layer_types=("full_attention", "sliding_attention", "full_attention") * 2,
)
MPNET = replace(BERT, architecture="mpnet", position_bias=True)
MINILM, DEEP = Objective.named("minilm"), Objective.named("layer-to-layer")


def fit(objective=MINILM, teacher=BERT, **changes):
    return fit_student("s", objective, teacher, **{"layers": 2, "hidden": 24} | changes)


def test_a_student_that_fits_has_its_whole_shape():
    assert fit() == replace(BERT, layers=2, hidden=24, ffn=96, has_head=False)
    shape = fit(teacher=MODERNBERT, heads=4, layers=4)
    assert shape.ffn == 40 and shape.layer_types == MODERNBERT.layer_types[2:]
    assert fit(Objective.named("minilmv2", relation_heads=12), heads=2, ffn=50).ffn == 50
    assert fit(Objective.named("soft-label-mlm"), heads=2).has_head
    assert fit(DEEP, layers=6).layers == 6
    assert fit(MINILM, layers=8).layers == 8
    assert fit(init="teacher-layers", layers=6, hidden=48) == replace(BERT, has_head=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fit(hidden=25),
            "student 's': 4 heads do not divide hidden size 25; give a multiple of 4, or with relation_heads other"
            " heads",
        ),
        (
            lambda: fit(heads=2),
            "student 's': the teacher has 4 heads and the student 2; give both the same number, or set"
            " relation_heads to divide 48 and 24",
        ),
        (
            lambda: fit(Objective.named("minilmv2", relation_heads=16)),
            "student 's': 16 relation heads do not divide the student's hidden size 24; give a divisor of 24",
        ),
        (
            lambda: fit(Objective.named("minilm", relation_heads=2), MPNET),
            "student 's': 2 relation heads cannot carry a position bias made for 4 heads; leave relation_heads"
            " out for q-k",
        ),
        (
            lambda: fit(DEEP, layers=5, layer=4),
            "student 's': it has 5 layers and the teacher 4 up to its tap; layer-to-layer needs a student that"
            " is not deeper",
        ),
        (
            lambda: fit(DEEP, MODERNBERT, layers=6),
            "student 's': layer 2 of this modernbert attends to a window only; tap one that sees all: 1, 3, 4, 6",
        ),
        (
            lambda: fit(teacher=MODERNBERT, hidden=20),
            "student 's': hidden size 20 gives 4 heads of an odd size, 5, and modernbert rotates their dimensions"
            " in pairs; choose a multiple of 8",
        ),
        (
            lambda: fit(teacher=MODERNBERT, layers=7),
            "student 's': a modernbert student has at most the layers of its teacher, 6, not 7",
        ),
        (
            lambda: fit(init="teacher-layers", layers=7),
            "student 's': 7 student layers cannot start from 6 teacher layers; give 6 or fewer, or start at random",
        ),
        (
            lambda: fit(init="teacher-layers", hidden=96, ffn=96),
            "student 's': a hidden size of 96 cannot start from the teacher's 48; give 48 or less, or start at"
            " random",
        ),
        (
            lambda: fit(init="teacher-layers", ffn=200),
            "student 's': a feed-forward size of 200 cannot start from the teacher's 192; give 192 or less, or"
            " start at random",
        ),
        (
            lambda: fit(Objective.named("minilmv2", relation_heads=2), init="teacher-layers", heads=2),
            "student 's': 2 student heads cannot start from 4 teacher heads; give both the same number",
        ),
        (
            lambda: fit(init="zero"),
            "student 's': initialisation 'zero' is not known; use one of random, teacher-layers, teacher-pca",
        ),
        (
            lambda: check_teacher(MINILM, BERT, 7),
            'layer 7 does not exist; bert has layers 1 to 6, or "last"',
        ),
        (
            lambda: check_teacher(MINILM, MODERNBERT, 5),
            "layer 5 of this modernbert attends to a window only; tap one that sees all: 1, 3, 4, 6",
        ),
        (
            lambda: check_teacher(Objective.named("soft-label-mlm"), replace(BERT, has_head=False)),
            "soft labels need a masked-language-model head, and the teacher has none; give a model that was"
            " saved with its head, or an objective of relations, such as minilm",
        ),
        (
            lambda: Objective.named("layer-to-layer", relations=[{"name": "a", "x": "q", "y": "hidden"}]),
            "term 'a' reads q, hidden, and layer-to-layer compares what every layer has: bias, k, q, v; use"
            " another objective, or other relations",
        ),
        (
            lambda: Objective.named(relations=[{"term": "cosine", "name": "a"}]),
            "term 'cosine' is not known; use one of relation, squared_error, soft_labels,"
            " cosine_distance, similarity",
        ),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value) == message


def test_a_head_that_the_config_does_not_tell_of_may_be_there():
    check_teacher(Objective.named("soft-label-mlm"), replace(BERT, has_head=None))
    check_teacher(Objective.named("soft-label-mlm"), replace(BERT, has_head=True))
