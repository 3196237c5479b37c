"""A student that starts from its teacher's layers: which layers, which slice, what stays random."""

import pytest
import torch
from transformers import AutoConfig

from minilm.model.encoder.build import build_student
from minilm.model.encoder.initialize import from_teacher, initialize
from minilm.model.encoder.shape import FAMILIES, picked_layers
from minilm.model.errors import ModelError


def build(architecture="bert", layers=4, hidden=16, heads=4, seed=0, **changes):
    config = AutoConfig.for_model(
        architecture, vocab_size=30, max_position_embeddings=20, pad_token_id=1, **changes
    )
    return build_student(config, layers=layers, hidden=hidden, heads=heads, seed=seed)


def test_layers_are_picked_evenly_and_end_at_the_last():
    assert picked_layers(12, 6) == [2, 4, 6, 8, 10, 12]
    assert picked_layers(12, 5) == [3, 5, 8, 10, 12]
    assert picked_layers(6, 6) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ModelError, match=r"^7 student layers cannot start from 6 teacher layers$"):
        picked_layers(6, 7)


def test_equal_sizes_copy_whole_layers():
    teacher, student = build(layers=4), build(layers=2, seed=1)
    copied = from_teacher(student, teacher)
    assert set(copied) == set(student.state_dict())
    for mine, theirs in ((0, 1), (1, 3)):
        for key, value in student.encoder.layer[mine].state_dict().items():
            assert torch.equal(value, teacher.encoder.layer[theirs].state_dict()[key])
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_architecture_finds_its_layers(architecture):
    teacher, student = build(architecture, layers=4), build(architecture, layers=2, seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copied = from_teacher(student, teacher)
    assert set(copied) == set(before)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".0." in name for name in changed) and any(".1." in name for name in changed)


def test_a_narrower_student_takes_leading_entries_and_keeps_heads_apart():
    teacher, student = build(hidden=16), build(hidden=8, seed=1)
    from_teacher(student, teacher)
    theirs, mine = (m.encoder.layer[0].attention for m in (teacher, student))
    for head in range(4):
        rows_t, rows_s = slice(4 * head, 4 * head + 2), slice(2 * head, 2 * head + 2)
        assert torch.equal(mine.self.query.weight[rows_s], theirs.self.query.weight[rows_t, :8])
        assert torch.equal(mine.self.value.bias[rows_s], theirs.self.value.bias[rows_t])
        assert torch.equal(mine.output.dense.weight[:, rows_s], theirs.output.dense.weight[:8, rows_t])
    assert torch.equal(
        student.encoder.layer[3].intermediate.dense.weight,
        teacher.encoder.layer[3].intermediate.dense.weight[:32, :8],
    )


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            lambda: build("electra", layers=2),
            "a electra student cannot start from the layers of a bert teacher",
        ),
        (
            lambda: build(heads=2),
            "2 student heads cannot start from 4 teacher heads; give both the same number",
        ),
        (
            lambda: build(hidden=32),
            "embeddings.word_embeddings.weight is [30, 32] in the student and [30, 16] in the teacher: wider",
        ),
    ],
)
def test_students_that_do_not_fit(student, message):
    with pytest.raises(ModelError) as caught:
        from_teacher(student(), build())
    assert str(caught.value) == message


def test_modernbert_has_no_slice():
    with pytest.raises(ModelError, match=r"^modernbert keeps q, k and v in one matrix: no slice is defined"):
        from_teacher(build("modernbert", layers=2, hidden=8), build("modernbert"))


def test_a_recipe_names_the_start():
    teacher, student, other = build(layers=4), build(layers=2, seed=1), build(layers=2, seed=1)
    start = student.embeddings.word_embeddings.weight.clone()
    initialize(student, teacher, "random")
    assert torch.equal(student.embeddings.word_embeddings.weight, start)
    initialize(student, teacher, "teacher-layers")
    from_teacher(other, teacher)
    for mine, same in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, same)
    with pytest.raises(
        ModelError, match=r"^initialisation 'zero' is not known; use one of random, teacher-layers$"
    ):
        initialize(student, teacher, "zero")
