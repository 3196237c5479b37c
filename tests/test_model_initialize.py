"""A student that starts from its teacher's layers: which layers, which slice, what stays random."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.initialize import from_teacher, initialize, picked_layers
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
    with pytest.raises(
        ModelError, match=r"^7 student layers cannot start from 6 teacher layers; give 6 or fewer, or start"
    ):
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
            "a hidden size of 32 cannot start from the teacher's 16; give 16 or less, or start at random",
        ),
    ],
)
def test_students_that_do_not_fit(student, message):
    with pytest.raises(ModelError) as caught:
        from_teacher(student(), build())
    assert str(caught.value) == message


# Where the rows of a head (size 8 in the teacher, 4 in the student) come from, whole rotated pairs (i, i + 4) included.
LEADING, PAIRS = [0, 1, 2, 3], [0, 2, 4, 6]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_narrower_student_takes_its_slice_by_the_familys_structure(architecture):
    teacher, student = build(architecture, hidden=32), build(architecture, hidden=16, layers=2, seed=1)
    copied = from_teacher(student, teacher)
    assert set(copied) == set(student.state_dict())
    theirs, mine = (dict(layer_of(m, i)) for m, i in ((teacher, 4), (student, 2)))

    def rows(kept, block=0):
        return [32 * block + 8 * head + row for head in range(4) for row in kept]

    rotated = PAIRS if architecture in ("modernbert", "eurobert", "nomic_bert") else LEADING
    if architecture == "modernbert":
        ffn = [*range(24), *range(48, 72)]  # the gate's half and the other, each sliced
        qkv = rows(rotated) + rows(rotated, 1) + rows(LEADING, 2)
        expected = {"attn.Wqkv": (qkv, range(16)), "attn.Wo": (range(16), rows(LEADING))}
        expected |= {"mlp.Wi": (ffn, range(16)), "mlp.Wo": (range(16), range(24))}
    else:
        q, k, v, o, up, down = PARTS[architecture]
        expected = {
            q: (rows(rotated), range(16)),
            k: (rows(rotated), range(16)),
            v: (rows(LEADING), range(16)),
        }
        expected |= {o: (range(16), rows(LEADING)), up: (range(64), range(16)), down: (range(16), range(64))}
    for name, (from_rows, from_columns) in expected.items():
        whole = theirs[f"{name}.weight"]
        assert torch.equal(mine[f"{name}.weight"], whole[list(from_rows)][:, list(from_columns)]), name
        if f"{name}.bias" in mine:
            assert torch.equal(mine[f"{name}.bias"], theirs[f"{name}.bias"][list(from_rows)]), name


_BERT = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
_BERT += ("attention.output.dense", "intermediate.dense", "output.dense")
_LLAMA = tuple(f"self_attn.{part}_proj" for part in "qkvo") + ("mlp.gate_proj", "mlp.down_proj")
PARTS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT)
PARTS |= {"eurobert": _LLAMA, "nomic_bert": _LLAMA}
PARTS["distilbert"] = tuple(f"attention.{part}_lin" for part in ("q", "k", "v", "out")) + (
    "ffn.lin1",
    "ffn.lin2",
)
PARTS["mpnet"] = tuple(f"attention.attn.{part}" for part in "qkvo") + ("intermediate.dense", "output.dense")


def layer_of(model, number):
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    return blocks[number - 1].state_dict()


def test_a_rotated_slice_turns_as_the_teacher_does():
    """With half the pairs of a head, the student's pair i has the frequency of the teacher's pair 2i."""
    teacher, student = build("nomic_bert", hidden=32), build("nomic_bert", hidden=16, seed=1)
    half, whole = student.rotary_emb.inv_freq, teacher.rotary_emb.inv_freq
    torch.testing.assert_close(half, whole[[0, 2]])


def test_grouped_keys_and_values_are_given_to_each_head_of_the_group():
    """At equal sizes the student, which has keys of its own for each head, computes what its teacher does."""
    config = AutoConfig.for_model(
        "eurobert", vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=20, pad_token_id=1,
        mask_token_id=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        teacher = AutoModel.from_config(config).eval()
    student = build_student(config, layers=2, hidden=16, seed=1).eval()
    from_teacher(student, teacher)
    ids = torch.arange(5, 15)[None]
    assert teacher.layers[0].self_attn.k_proj.weight.shape == (8, 16)
    torch.testing.assert_close(student(ids).last_hidden_state, teacher(ids).last_hidden_state)


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
        ModelError,
        match=r"^initialisation 'zero' is not known; use one of random, teacher-layers, teacher-pca$",
    ):
        initialize(student, teacher, "zero")
