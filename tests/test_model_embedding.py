"""Pooled vectors: the terms that compare them, the head that makes them, folders of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer

from minilm.model.compatibility import student_layout, teacher_layout
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.sentence_head import SentenceHead, load_head, pool
from minilm.model.encoder.sentence_layout import POOLINGS, DenseLayer, SentenceLayout, read_layout
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.export import export_student, model_card, weights_digest
from minilm.model.loss.embedding import CosineDistance, Similarity
from minilm.model.loss.objective import Objective
from minilm.model.loss.terms import Pair, Setting
from tests.conftest import make_embedder

SETTING = Setting("sequence", None, "auto")


def pair(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor | None = None) -> Pair:
    empty = torch.zeros(0)
    return Pair(*(Taps(empty, empty, empty, pooled=side) for side in (teacher, student)), mask)


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def test_the_terms_are_half_the_squared_distance_and_the_difference_of_cosines():
    teacher, student = vectors(0), vectors(1).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)  # the third row is all padding
    t, s = normalize(teacher), normalize(student)
    kept = [0, 1, 3]
    distance = CosineDistance("c")
    by_hand = (t - s).square().sum(-1) / 2
    torch.testing.assert_close(distance.sum(SETTING, pair(teacher, student)), by_hand.sum())
    torch.testing.assert_close(distance.sum(SETTING, pair(teacher, student, mask)), by_hand[kept].sum())
    prefix = (normalize(teacher[:, :2]) - normalize(student[:, :2])).square().sum(-1) / 2
    torch.testing.assert_close(replace(distance, dims=2).sum(SETTING, pair(teacher, student)), prefix.sum())
    similarity = Similarity("s")
    fixed = s.detach()
    squares = torch.tensor([[(t[i] @ t[j] - fixed[i] @ fixed[j]) ** 2 for j in range(4)] for i in range(4)])
    torch.testing.assert_close(similarity.sum(SETTING, pair(teacher, student)), squares.mean(1).sum())
    three = squares[kept][:, kept].mean(1).sum()
    torch.testing.assert_close(similarity.sum(SETTING, pair(teacher, student, mask)), three)
    for term in (distance, similarity):
        assert term.sum(SETTING, pair(teacher, 3 * teacher)).abs() < 1e-6
        (gradient,) = torch.autograd.grad(term.sum(SETTING, pair(teacher, student, mask)), student)
        assert gradient.isfinite().all() and not gradient[2].any() and gradient[kept].abs().max() > 0.01


@pytest.mark.parametrize("how", POOLINGS)
def test_pooling_sees_valid_tokens_alone_wherever_the_padding_is(how):
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, :2] = False
    alone = {
        "mean": lambda rows: rows.mean(0),
        "cls": lambda rows: rows[0],
        "max": lambda rows: rows.amax(0),
        "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    }[how]
    found = pool(states.masked_fill(~mask[..., None], 9.0), mask, how)
    torch.testing.assert_close(found, torch.stack([alone(states[i][mask[i]]) for i in range(3)]))
    torch.testing.assert_close(pool(states, None, how), pool(states, torch.ones_like(mask), how))
    assert not pool(states, torch.zeros_like(mask), how).any()


def encoder(architecture: str, layers: int, hidden: int, head: SentenceLayout) -> TappedEncoder:
    values = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {FAMILIES[architecture].ffn: 32, "max_position_embeddings": 20, "pad_token_id": 1}
    config = AutoConfig.for_model(architecture, **values)
    if architecture == "modernbert":
        config.layer_types = ["full_attention"] * 2
    model = build_student(config, layers=layers, hidden=hidden, seed=layers, dropout=0.0)
    tapped = TappedEncoder(model, layers)
    tapped.head = SentenceHead(head, seed=layers)
    return tapped


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert", "mpnet"])
def test_all_of_a_student_is_trained_to_its_end_against_the_models_own_output(architecture):
    objective = Objective.named("embedding")
    narrow = student_layout("s", objective, SentenceLayout("cls"), 16, 8)
    assert narrow == SentenceLayout("cls", (DenseLayer(8, 16),))
    teacher = encoder(architecture, 2, 16, SentenceLayout("cls", normalize=False))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distiller = Distiller(teacher, {"s": encoder(architecture, 1, 8, narrow)}, objective)
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    student = distiller.students["s"]
    output = distiller.teacher_forward(ids, mask)
    (value,) = distiller.term_sums("s", output, ids, mask)
    states = [side.model(input_ids=ids, attention_mask=mask).last_hidden_state for side in (teacher, student)]
    assert student.head is not None
    target, got = normalize(states[0][:, 0]), normalize(student.head.linear[0](states[1][:, 0]))
    torch.testing.assert_close(value, (1 - (target * got).sum(-1)).sum())
    value.backward()
    trained = distiller.trained_parameters("s")
    left = {key for key, _ in student.model.named_parameters()} - trained.keys()
    assert all("pooler" in key for key in left)
    assert {"head.linear.0.weight", "head.linear.0.bias"} < trained.keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    held = {tensor.data_ptr() for tensor in distiller.state_module("s").state_dict().values()}
    assert all(p.data_ptr() in held for p in trained.values())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_an_embedding_needs_heads_and_counts_sequences():
    bare = encoder("bert", 2, 16, SentenceLayout())
    bare.head = None
    with pytest.raises(ModelError, match="set `head` of the teacher and of every student"):
        Distiller(bare, {"s": encoder("bert", 1, 16, SentenceLayout())}, Objective.named("embedding"))
    with pytest.raises(
        ModelError, match='cosine_distance: vectors of whole sequences .* use reduction "sequence"'
    ):
        Objective.named("embedding", reduction="token")
    with pytest.raises(ModelError, match="it has no modules.json"):
        teacher_layout(Objective.named("embedding"), "the teacher t", None, 16)
    told = Objective.named("embedding", pooling="cls")
    assert teacher_layout(told, "the teacher t", None, 16) == SentenceLayout("cls")


def test_a_student_keeps_the_dense_layer_and_the_pooling_of_the_model_it_starts_from():
    objective, start = (
        Objective.named("embedding"),
        SentenceLayout("cls", (DenseLayer(8, 16, path="2_Dense"),), False),
    )
    kept = student_layout("s", objective, SentenceLayout(), 16, 8, start)
    assert kept == replace(start, normalize=True)
    asked = student_layout("s", replace(objective, dense=True, pooling="mean"), SentenceLayout("cls"), 16, 16)
    assert asked == SentenceLayout("mean", (DenseLayer(16, 16),))
    states = torch.randn(2, 3, 16)
    untouched = normalize(states.mean(1), dim=-1)
    torch.testing.assert_close(SentenceHead(asked)(states, None), untouched)  # it starts as the identity


def write(folder: Path, name: str, values: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def modules(folder: Path, *kinds: str, package: str = "sentence_transformers.models.") -> None:
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{package}{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write(folder, "modules.json", listed)


DENSE = {
    "in_features": 16,
    "out_features": 8,
    "bias": False,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


def test_folders_of_old_and_new_versions_are_read(tmp_path):
    assert read_layout(tmp_path, 16) is None
    modules(tmp_path, "Transformer", "Pooling", "Dropout", "Dense", "Normalize")
    write(
        tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    )
    write(tmp_path, "3_Dense/config.json", DENSE)
    layer = DenseLayer(16, 8, False, "Tanh", "3_Dense")
    assert read_layout(tmp_path, 16) == SentenceLayout("cls", (layer,))
    weight = torch.randn(8, 16)
    save_file({"linear.weight": weight}, tmp_path / "3_Dense" / "model.safetensors")
    states = torch.randn(2, 3, 16)
    found = load_head(tmp_path, SentenceLayout("cls", (layer,)))(states, None)
    torch.testing.assert_close(found, normalize(torch.tanh(states[:, 0] @ weight.T), dim=-1))
    modules(
        tmp_path, "Transformer", "Pooling", package="sentence_transformers.sentence_transformer.modules.x."
    )
    write(tmp_path, "1_Pooling/config.json", {"embedding_dimension": 16, "pooling_mode": "mean"})
    assert read_layout(tmp_path, 16) == SentenceLayout("mean", (), False)


@pytest.mark.parametrize(
    ("kinds", "file", "values", "said"),
    [
        (["Transformer", "Pooling", "LayerNorm"], "x.json", {}, "modules.json has LayerNorm: known are Transformer"),
        (["Transformer"], "x.json", {}, "modules.json has no Pooling: its vectors would be undefined"),
        (["Pooling", "Transformer"], "x.json", {}, "modules.json has Pooling: the model itself must come first"),
        (
            ["Transformer", "Pooling"],
            "modules.json",
            [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "../1_Pooling"}],
            "modules.json has Pooling in ../1_Pooling: modules lie in folders of the model's own; give",
        ),
        (
            ["Transformer", "Pooling"],
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False},
            '1_Pooling/config.json names no pooling; write "pooling_mode": "mean" (or cls, max, mean_sqrt_len_tokens) '
            "into it, as the model was trained to be pooled",
        ),
        (["Transformer", "Pooling"], "modules.json", [3], "modules.json is no list of modules; bring it again"),
        (["Transformer", "Pooling"], "modules.json", {}, "modules.json is not what sentence-transformers writes"),
        (
            ["Transformer", "Pooling"],
            "1_Pooling/config.json",
            {"pooling_mode": ["cls", "mean"]},
            "config.json pools by cls and mean; use a model that pools by one of mean, cls, max",
        ),
        (
            ["Transformer", "Pooling", "Dense"],
            "2_Dense/config.json",
            DENSE | {"activation_function": "torch.nn.modules.activation.Softmax"},
            "has the activation torch.nn.modules.activation.Softmax; use a dense layer with one of Identity, Tanh",
        ),
        (
            ["Transformer", "Pooling", "Dense"],
            "2_Dense/config.json",
            DENSE | {"use_residual": True},
            "2_Dense/config.json has a residual connection",
        ),
        (
            ["Transformer", "Pooling", "Dense"],
            "2_Dense/config.json",
            DENSE | {"in_features": 12},
            "2_Dense/config.json maps 12 numbers to 8, and gets 16; bring the folder again as it was saved",
        ),
        (
            ["Transformer", "Pooling", "Dense"],
            "2_Dense/config.json",
            DENSE | {"module_input_name": "token_embeddings"},
            "reads or writes other things than the sentence's vector",
        ),
        (["Transformer", "Pooling", "Dense"], "x.json", {}, "2_Dense/config.json is missing or damaged"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_applied_are_refused(kinds, file, values, said, tmp_path):
    modules(tmp_path, *kinds)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    write(tmp_path, file, values)
    with pytest.raises(ModelError) as told:
        read_layout(tmp_path, 16)
    assert said in str(told.value)


@pytest.mark.parametrize("value", [5, 1.5, True, "x", [], ["x"], [[]], [5], {}, {"x": []}, None])
def test_a_value_of_any_kind_is_read_or_refused_in_a_line(value, tmp_path):
    """Every key that is read, with every kind of JSON."""
    sound = {
        "1_Pooling/config.json": {"pooling_mode": "mean"},
        "2_Dense/config.json": DENSE | {"use_residual": False},
        "sentence_bert_config.json": {"do_lower_case": False},
    }
    keys = {
        "1_Pooling/config.json": ["pooling_mode", "pooling_mode_cls_token"],
        "2_Dense/config.json": [*DENSE, "use_residual", "module_input_name", "module_output_name"],
        "sentence_bert_config.json": ["do_lower_case"],
    }
    listed = [{"type": kind, "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))]

    def told() -> None:
        try:
            read_layout(tmp_path, 16)
        except ModelError as error:
            assert "\n" not in str(error)

    modules(tmp_path, "Transformer", "Pooling", "Dense")
    for file, wanted in keys.items():
        for key in wanted:
            for other, values in sound.items():
                write(tmp_path, other, values)
            write(tmp_path, file, sound[file] | {key: value})
            told()
        write(tmp_path, file, value)
        told()
        write(tmp_path, file, sound[file])
    assert read_layout(tmp_path, 16) is not None
    for module in ({"type": "Pooling", "path": value}, {"type": value, "path": ""}, value):
        write(tmp_path, "modules.json", [listed[0], module])
        told()


def test_text_that_only_sentence_transformers_lower_cases_is_refused(teacher, tmp_path):
    folder = make_embedder(shutil.copytree(teacher, tmp_path / "m"))
    write(folder, "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer["normalizer"]["lowercase"] is True and read_layout(folder, 48) is not None
    write(folder, "tokenizer.json", tokenizer | {"normalizer": {"type": "NFC"}})
    with pytest.raises(ModelError) as told:
        read_layout(folder, 48)
    assert str(told.value) == (
        f"{folder}/sentence_bert_config.json says do_lower_case, and the tokenizer in {folder} keeps capitals, so rows "
        "would have them; let the tokenizer do it (tokenizer.backend_tokenizer.normalizer = "
        "tokenizers.normalizers.Lowercase(), then save_pretrained), or set do_lower_case to false if the model was "
        "trained with capitals"
    )
    lowering = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    write(folder, "tokenizer.json", tokenizer | {"normalizer": lowering})
    assert read_layout(folder, 48) is not None


def test_dense_weights_that_are_not_sound_are_refused(teacher, tmp_path):
    folder = make_embedder(shutil.copytree(teacher, tmp_path / "m"), dense=8)
    layout = read_layout(folder, 48)
    assert layout is not None
    file = folder / "2_Dense" / "model.safetensors"
    sound = load_file(file)
    for spoil, said in (
        (
            lambda: save_file(sound | {"linear.bias": torch.full((8,), torch.nan)}, file),
            "not finite; bring it again",
        ),
        (lambda: save_file({"linear.bias": torch.zeros(8)}, file), "is damaged, or not of its config.json"),
        (lambda: file.write_bytes(b"x"), "is damaged, or not of its config.json"),
        (
            file.unlink,
            r"2_Dense/model.safetensors is missing; bring the whole folder again, and .* a pickle, pytorch_model.bin, "
            r"bring that into it too and make a model.safetensors of it: python -c",
        ),
        (lambda: file.with_name("pytorch_model.bin").touch(), "a pickle, which is not read here"),
    ):
        spoil()
        with pytest.raises(ModelError, match=said):
            load_head(folder, layout)


def test_a_turned_dense_layer_keeps_the_cosines_and_is_the_nearest_such_map():
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(9, 12, generator=generator)  # fewer texts than dimensions
    wanted = torch.randn(9, 20, generator=generator)
    head = SentenceHead(SentenceLayout("mean", (DenseLayer(12, 20),)))
    head.turn(given, wanted)
    turned = head.linear[0](given)
    torch.testing.assert_close(turned @ turned.T, given @ given.T, rtol=1e-4, atol=1e-4)
    reached = (turned - wanted).square().sum()
    for _ in range(20):
        q, r = torch.linalg.qr(head.linear[0].weight + 0.01 * torch.randn(20, 12, generator=generator))
        other = q * r.diagonal().sign()  # near the weight, and not near its opposite
        assert reached < (given @ other.T - wanted).square().sum()
    narrower = SentenceHead(SentenceLayout("mean", (DenseLayer(12, 5),)))
    narrower.turn(given, wanted[:, :5])
    weight = narrower.linear[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-5)


def exported(teacher: Path, out: Path) -> tuple[Path, SentenceHead]:
    model = AutoModel.from_pretrained(teacher)
    head = SentenceHead(SentenceLayout("mean", (DenseLayer(48, 64),)), seed=4)
    facts = {"Objective": "embedding"}
    card = model_card("s", model, trained=[], teacher="t", facts=facts, head=head)
    export_student(model, teacher, out, card, head)
    return out, head


def test_an_exported_embedder_is_a_plain_folder_whose_dense_layer_counts(teacher, tmp_path):
    folder, head = exported(teacher, tmp_path / "one")
    layout = read_layout(folder, 48)
    assert layout == SentenceLayout("mean", (DenseLayer(48, 64, path="2_Dense"),))
    states = torch.randn(2, 3, 48)
    assert torch.equal(load_head(folder, layout)(states, None), head(states, None))
    model = AutoModel.from_pretrained(folder)
    assert not [key for key, p in AutoModel.from_pretrained(teacher).named_parameters() if not torch.equal(
        p, model.get_parameter(key))]  # fmt: skip
    before = weights_digest(folder)
    assert before != weights_digest(teacher) == weights_digest(model.state_dict())
    with torch.no_grad():
        head.linear[0].bias[3] += 1
    export_student(model, teacher, folder, "card", head)
    assert weights_digest(folder) != before
    card = (exported(teacher, tmp_path / "two")[0] / "README.md").read_text()
    assert "**Use it as it is.**" in card and "Fine-tune it before use" not in card
    assert "| Vectors | 64 numbers: mean pooling, a dense layer to 64 |" in card
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_sentence_transformers_makes_the_same_vectors(teacher, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = ["time year people", "way day man thing woman life child world school", "state . family"]
    folder, head = exported(teacher, tmp_path / "one")
    other = make_embedder(shutil.copytree(teacher, tmp_path / "other"), pooling="cls", dense=24)
    layout = read_layout(other, 48)
    assert layout is not None
    for place, ours in ((folder, head), (other, load_head(other, layout))):
        inputs = AutoTokenizer.from_pretrained(place)(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = AutoModel.from_pretrained(place)(**inputs).last_hidden_state
            expected = ours(states, inputs["attention_mask"].bool())
        found = torch.from_numpy(SentenceTransformer(str(place), device="cpu").encode(texts))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_the_page_shows_asymmetric_search(teacher, tmp_path):
    """The Python of docs/embedding.md, with a student that has its teacher's weights."""
    page = Path(__file__).resolve().parent.parent / "docs" / "embedding.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    folder = make_embedder(shutil.copytree(teacher, tmp_path / "m"), dense=64)
    layout = read_layout(folder, 48)
    assert layout is not None
    student = tmp_path / "student"
    export_student(AutoModel.from_pretrained(folder), folder, student, "card", load_head(folder, layout))
    names = {"STUDENT": str(student), "TEACHER": str(folder)}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["index"].shape == (3, 64)
    assert names["best"].tolist() == [0, 2]
