"""The tap, for every architecture: right q, k, v; nothing behind it runs; nothing behind it is trained."""

import gc
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, count_parameters, load_encoder
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.shape import load_config, shape_of, student_shape, tapped_layer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.export import weights_digest
from minilm.model.kernels import shared_cast
from minilm.model.loss.objective import Objective

LAYERS, HIDDEN, HEADS, VOCAB = 4, 24, 4, 50


def tiny_config(architecture: str = "bert", **changes):
    family = FAMILIES[architecture]
    values = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        family.ffn: 40,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    } | changes
    if architecture == "electra":
        values |= {"embedding_size": 16}
    if architecture == "modernbert":
        values |= {"local_attention": 4, "cls_token_id": 2, "sep_token_id": 3}
    if architecture == "mpnet":
        values |= {"relative_attention_num_buckets": 32}
    if architecture == "eurobert":
        values |= {"num_key_value_heads": 2}
    return AutoConfig.for_model(architecture, **values)


def tiny_model(architecture: str = "bert", seed: int = 0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(architecture, **changes))
        for parameter in model.parameters():  # larger than an initialisation, so that mistakes show
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(tokens: int = 9):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, VOCAB, (3, tokens), generator=generator)
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, :2] = False
    return input_ids.masked_fill(~mask, 1), mask


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x, theta):
    """Rotary embedding as in arXiv 2104.09864, written for one position at a time."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for position in range(x.shape[-2]):
        for i in range(half):
            angle = torch.tensor(position * theta ** (-i / half), dtype=x.dtype)
            a, b = x[..., position, i], x[..., position, i + half]
            out[..., position, i] = a * angle.cos() - b * angle.sin()
            out[..., position, i + half] = b * angle.cos() + a * angle.sin()
    return out


def projections(model, layer, hidden):
    """q, k, v from the module's own weights and its input, each architecture by its own names."""
    kind = model.config.model_type
    if kind in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        attention = model.encoder.layer[layer - 1].attention.self
        return [split(p(hidden), HEADS) for p in (attention.query, attention.key, attention.value)]
    if kind == "mpnet":
        attention = model.encoder.layer[layer - 1].attention.attn
        return [split(p(hidden), HEADS) for p in (attention.q, attention.k, attention.v)]
    if kind == "distilbert":
        attention = model.transformer.layer[layer - 1].attention
        return [split(p(hidden), HEADS) for p in (attention.q_lin, attention.k_lin, attention.v_lin)]
    if kind == "modernbert":
        block = model.layers[layer - 1]
        q, k, v = (split(x, HEADS) for x in block.attn.Wqkv(block.attn_norm(hidden)).chunk(3, dim=-1))
        theta = 160_000.0 if block.attention_type == "full_attention" else 10_000.0
        return [rotate(q, theta), rotate(k, theta), v]
    if kind == "eurobert":
        block = model.layers[layer - 1]
        hidden = block.input_layernorm(hidden)
        q, k, v = (
            split(projection(hidden), heads)
            for projection, heads in zip(
                (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                (HEADS, 2, 2),
                strict=True,
            )
        )
        theta = model.config.rope_parameters["rope_theta"]
        return [rotate(q, theta), rotate(k, theta).repeat_interleave(2, 1), v.repeat_interleave(2, 1)]
    assert kind == "nomic_bert"
    attention = model.layers[layer - 1].self_attn
    q, k, v = (split(p(hidden), HEADS) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    theta = model.config.rope_parameters["rope_theta"]
    return [rotate(q, theta), rotate(k, theta), v]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_taps_equal_the_projections_of_an_untapped_forward(architecture):
    layer = tapped_layer(tiny_config(architecture), "last")
    untapped = tiny_model(architecture)
    encoder = TappedEncoder(tiny_model(architecture), layer)
    for input_ids, mask in (batch(), (batch()[0], None)):
        hidden = untapped(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer - 1]
        taps = encoder(input_ids, mask)
        for got, expected in zip((taps.q, taps.k, taps.v), projections(untapped, layer, hidden), strict=True):
            assert got.shape == (3, HEADS, 9, HIDDEN // HEADS)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if architecture == "mpnet":
            bias = untapped.encoder.compute_position_bias(hidden)
            torch.testing.assert_close(taps.bias.expand_as(bias), bias)
        else:
            assert taps.bias is None


@pytest.mark.parametrize("architecture", FAMILIES)
def test_nothing_behind_the_tap_runs_and_only_what_is_in_front_is_trained(architecture):
    layer = LAYERS
    encoder = TappedEncoder(tiny_model(architecture).train(), layer)
    called = set()
    for name, module in encoder.model.named_modules():
        module.register_forward_pre_hook(lambda _module, _arguments, name=name: called.add(name))
    taps = encoder(*batch())
    blocks = max((m for m in encoder.model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    names = {id(module): name for name, module in encoder.model.named_modules()}
    for i, block in enumerate(blocks, start=1):
        inside = {names[id(module)] for module in block.modules() if isinstance(module, torch.nn.Linear)}
        assert inside
        if i < layer:
            assert inside <= called
        else:
            projections = {name for name in inside if name.rsplit(".", 1)[-1] in PROJECTIONS}
            assert projections and inside & called == projections
    assert "pooler" not in called and "final_norm" not in called and "norm" not in called

    sum(part.sum() for part in taps[:3]).backward()
    with_gradient = {name for name, p in encoder.model.named_parameters() if p.grad is not None}
    trained = encoder.trained_parameters()
    assert set(trained) == with_gradient
    assert trained.keys() <= encoder.model.state_dict().keys()
    behind = {name for name, _ in encoder.model.named_parameters()} - with_gradient
    assert behind and all(f".{layer - 1}." in name or name.split(".")[0] in LAST for name in behind)


PROJECTIONS = {
    "query",
    "key",
    "value",
    "q_lin",
    "k_lin",
    "v_lin",
    "q_proj",
    "k_proj",
    "v_proj",
    "Wqkv",
    "q",
    "k",
    "v",
}
LAST = {"pooler", "final_norm", "norm"}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_student_of_every_architecture_is_a_teacher(architecture, tmp_path):
    student = build_student(tiny_config(architecture), layers=2, hidden=16, seed=3)
    student.save_pretrained(tmp_path)
    teacher = load_encoder(tmp_path)
    assert not teacher.training and teacher.layer == 2
    shape = shape_of(load_config(tmp_path))
    assert (shape.architecture, shape.layers, shape.hidden, shape.heads) == (architecture, 2, 16, HEADS)
    assert (shape.ffn, shape.vocab_size) == (64 if FAMILIES[architecture].ffn_ratio else 32, VOCAB)
    input_ids = torch.full((1, shape.max_tokens), 5)
    assert teacher(input_ids).q.shape == (1, HEADS, shape.max_tokens, 4)
    grandchild = build_student(teacher.model.config, layers=1, hidden=8, seed=4)
    assert TappedEncoder(grandchild, 1)(input_ids).q.shape == (1, HEADS, shape.max_tokens, 2)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_the_shape_of_a_student_is_known_before_it_is_built(architecture, head, tmp_path):
    config = tiny_config(architecture)
    for sizes in (
        {"layers": 2, "hidden": 16},
        {"layers": 1, "hidden": 12, "heads": 2, "ffn": 20},
        {"layers": 4, "hidden": 24},
    ):
        build_student(config, **sizes, seed=0, head=head).save_pretrained(tmp_path)
        assert shape_of(load_config(tmp_path)) == student_shape(shape_of(config), **sizes, has_head=head)


@pytest.mark.parametrize(
    ("kind", "teacher", "hidden", "ffn"),
    [
        ("bert", (312, 1200), 192, 768),  # whatever its teacher has
        ("modernbert", (768, 1152), 384, 576),
        ("modernbert", (1024, 2624), 384, 984),
        ("modernbert", (1024, 2624), 1024, 2624),
        ("eurobert", (1152, 4096), 384, 1368),  # 1365.3, to the next multiple of 8
        ("nomic_bert", (768, 3072), 384, 1536),
        ("nomic_bert", (100, 90), 98, 90),  # no more than its teacher's
    ],
)
def test_a_students_feed_forward_size_is_in_its_familys_ratio_or_its_teachers(kind, teacher, hidden, ffn):
    shape = replace(shape_of(tiny_config(kind)), hidden=teacher[0], ffn=teacher[1], heads=1, layer_types=())
    assert student_shape(shape, layers=1, hidden=hidden).ffn == ffn


def test_a_layer_in_the_middle_and_two_taps_on_one_model():
    model = tiny_model()
    second, last = TappedEncoder(model, 2), TappedEncoder(model, LAYERS)
    input_ids, mask = batch()
    hidden = tiny_model()(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for encoder in (second, last, second):
        expected = projections(model, encoder.layer, hidden[encoder.layer - 1])
        torch.testing.assert_close(encoder(input_ids, mask).q, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "mpnet"])
def test_watching_layers_in_front_and_the_hidden_states_behind(architecture):
    model = tiny_model(architecture)
    encoder = TappedEncoder(model, 3)
    input_ids, mask = batch()
    plain = encoder(input_ids, mask)
    hidden = tiny_model(architecture)(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    encoder.watch(layers=(1, 2), fields=("q", "hidden"))
    called = []
    encoder.blocks()[2].register_forward_hook(lambda *_: called.append("third"))
    for _ in range(2):
        taps = encoder(input_ids, mask)
        torch.testing.assert_close(taps.q, plain.q)
        for layer, early in enumerate(taps.earlier, start=1):
            torch.testing.assert_close(
                early.k, TappedEncoder(tiny_model(architecture), layer)(input_ids, mask).k
            )
        torch.testing.assert_close(taps.hidden[mask], hidden[3][mask], rtol=1e-4, atol=1e-4)
    assert len(taps.earlier) == 2
    trained = set(encoder.trained_parameters())
    assert any(".2." in name and "dense" in name for name in trained) or architecture != "bert"
    assert not any(".3." in name for name in trained)
    with pytest.raises(ModelError, match=r"^layers \[3\] cannot be watched; use ascending ones from 1 to 2$"):
        encoder.watch(layers=(3,))


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_the_wrapped_model_stays_whole(architecture):
    input_ids, mask = batch()
    plain = tiny_model(architecture)(input_ids, attention_mask=mask).last_hidden_state
    model = tiny_model(architecture)
    encoder = TappedEncoder(model, 2)
    encoder(input_ids, mask)
    whole = model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(whole[mask], plain[mask])


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_row_of_padding_only_stays_finite(architecture):
    encoder = TappedEncoder(tiny_model(architecture), LAYERS)
    input_ids, mask = batch(tokens=24)
    mask[2] = False
    taps = encoder(input_ids, mask)
    assert all(part.isfinite().all() for part in taps[:3])
    torch.testing.assert_close(taps.v[:2], encoder(input_ids[:2], mask[:2]).v)


def test_the_forward_leaves_nothing_behind():
    """No activation survives but the taps, gradients off or on; no state after an error."""
    encoder = TappedEncoder(tiny_model(), LAYERS)
    input_ids, mask = batch()
    kept = []
    encoder.model.encoder.layer[1].register_forward_hook(lambda _m, _a, out: kept.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            taps = encoder(input_ids, mask)
        assert kept[-1]() is None
        assert not taps.q.requires_grad
    finally:
        gc.enable()

    with torch.inference_mode():
        assert encoder(input_ids, mask).q.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(input_ids, mask).q.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert encoder(input_ids, mask).q.requires_grad
    with pytest.raises(IndexError):
        encoder(input_ids + VOCAB, mask)
    assert encoder.model(input_ids).last_hidden_state.shape == (3, 9, HIDDEN)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_frozen_encoder_computes_in_bfloat16(architecture):
    encoder = TappedEncoder(tiny_model(architecture), LAYERS).requires_grad_(False)
    encoder.watch(layers=(1,), fields=("q", "hidden"))
    input_ids, mask = batch()
    exact = encoder(input_ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_autocast = encoder(input_ids, mask)
        encoder.compute_in(torch.bfloat16)
        ours = encoder(input_ids, mask)
    assert ours.hidden.dtype == torch.bfloat16
    for name in ("q", "k", "v", "hidden"):
        is_right, is_near = (
            getattr(taps, name)[mask if name == "hidden" else slice(None)] for taps in (exact, ours)
        )
        other = getattr(by_autocast, name)[mask if name == "hidden" else slice(None)]
        off, usual = ((x.double() - is_right.double()).square().mean().sqrt() for x in (is_near, other))
        assert off < 3 * usual, name
    for name, parameter in encoder.model.named_parameters():
        if parameter.dim() < 2 and "norm" in name.lower() or "relative_attention_bias" in name:
            assert parameter.dtype == torch.float32, name
    assert all(
        m.weight.dtype == torch.bfloat16 for m in encoder.model.modules() if isinstance(m, torch.nn.Linear)
    )


def test_queries_keys_and_values_keep_one_cast_of_their_input_and_their_gradients(monkeypatch):
    ids, mask = batch()
    gradients, inputs = [], []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(shared_cast, "install", lambda model: None)
        model = TappedEncoder(tiny_model("bert"), LAYERS).model
        attention = model.encoder.layer[1].attention.self
        for linear in (attention.query, attention.key, attention.value):
            linear.register_forward_hook(lambda _linear, given, _made: inputs.append(given[0]))
        with torch.autocast("cpu", torch.bfloat16):
            for rows in (ids, ids.roll(1, 1)):  # the second forward casts what it is given itself
                states = model(rows, attention_mask=mask).last_hidden_state
                (states * torch.linspace(-1, 1, HIDDEN)).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert [x.dtype for x in inputs] == 6 * [torch.bfloat16] + 6 * [torch.float32]
    places = [x.data_ptr() for x in inputs[:6]]
    assert places[0] == places[1] == places[2] != places[3] == places[4] == places[5]


def test_a_head_that_shares_the_embeddings_weight_keeps_sharing_it():
    model = AutoModelForMaskedLM.from_config(tiny_config()).eval()
    encoder = TappedEncoder(model, LAYERS).requires_grad_(False)
    encoder.watch(fields=("logits",))
    input_ids, mask = batch()
    positions = torch.zeros(3, 2, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = encoder(input_ids, mask, positions).logits
        encoder.compute_in(torch.bfloat16)
        torch.testing.assert_close(encoder(input_ids, mask, positions).logits, before, rtol=0.05, atol=0.02)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_threads_do_not_see_each_other():
    encoders = [TappedEncoder(tiny_model(seed=seed), layer) for seed, layer in enumerate((1, 2, 3, 4))]
    input_ids, mask = batch()
    expected = [encoder(input_ids, mask).q for encoder in encoders]
    wrong: list[int] = []

    def work(i):
        for _ in range(20):
            if not torch.equal(encoders[i](input_ids, mask).q, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_blocks_give_the_same_taps_and_trained_parameters():
    """Traced by dynamo, run eagerly: what a compiler makes of it is not our concern, that it can be traced is."""
    encoder = TappedEncoder(tiny_model(), 2)
    input_ids, mask = batch()
    plain, trained = encoder(input_ids, mask), list(encoder.trained_parameters())
    encoder.compile_blocks(backend="eager")
    taps = encoder(input_ids, mask)
    for part in ("q", "k", "v"):
        torch.testing.assert_close(getattr(taps, part), getattr(plain, part))
    assert list(encoder.trained_parameters()) == trained
    encoder.train()  # dropout in tiles is left out of the graph
    assert encoder(input_ids, mask).q.shape == plain.q.shape


def test_compiled_blocks_without_a_compiler_are_refused_in_a_line(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    with pytest.raises(
        ModelError, match=r"need a C\+\+ compiler and none was found: install g\+\+, set CXX to one"
    ):
        TappedEncoder(tiny_model(), 2).compile_blocks()


def test_trained_parameters_draws_nothing_and_changes_no_mode():
    encoder = TappedEncoder(tiny_model(), LAYERS)
    encoder.train()
    encoder.model.pooler.eval()
    before = torch.get_rng_state()
    modes = [module.training for module in encoder.modules()]
    assert encoder.trained_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in encoder.modules()] == modes
    encoder.requires_grad_(False)
    assert encoder.trained_parameters() == {}


def test_a_student_depends_on_its_seed_alone():
    config = tiny_config()
    torch.manual_seed(0)
    first = build_student(config, layers=2, hidden=16, seed=7)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = build_student(config, layers=2, hidden=16, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    other = build_student(config, layers=2, hidden=16, seed=8)
    weights = [m.encoder.layer[0].intermediate.dense.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.training and first.config.hidden_dropout_prob == 0.1
    assert build_student(config, layers=1, hidden=16, seed=7, dropout=0.0).config.hidden_dropout_prob == 0.0


# The paper (arXiv 2002.10957, tables 2-4): Transformer parameters to 0.1 M, all parameters in whole M.
@pytest.mark.parametrize(
    ("layers", "hidden", "transformer_m", "total_m"),
    [(6, 768, 42.5, 66), (12, 384, 21.3, 33), (6, 384, 10.6, 22), (4, 384, 7.1, 19), (3, 384, 5.3, 17)],
)
def test_parameters_are_the_papers(layers, hidden, transformer_m, total_m):
    """The feed-forward width scales with the hidden size: left at the teacher's 3072 a 6 x 384 student had 17.7 M
    Transformer parameters instead of 10.6 M."""
    student = build_student(AutoConfig.for_model("bert"), layers=layers, hidden=hidden, seed=0)
    assert round(count_parameters(student.encoder) / 1e6, 1) == transformer_m
    assert int(count_parameters(student) / 1e6) == total_m


# ---- Bad input ----


def test_an_unsupported_architecture_is_refused_by_name(tmp_path):
    AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_encoder(tmp_path)
    assert str(caught.value) == f"architecture 'gpt2' has no tap; these have: {', '.join(FAMILIES)}"


@pytest.mark.parametrize("layer", [0, 5, "first"])
def test_a_layer_that_does_not_exist(tmp_path, layer):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'does not exist; bert has layers 1 to 4, or "last"$'):
        load_encoder(tmp_path, layer=layer)


def test_a_layer_that_sees_a_window_only():
    with pytest.raises(ModelError, match=r"^layer 2 of this modernbert attends to a window only; .*: 1, 4$"):
        tapped_layer(tiny_config("modernbert"), 2)


def test_heads_that_do_not_divide_hidden():
    with pytest.raises(
        ModelError,
        match=r"^4 heads do not divide hidden size 18; give a multiple of 4, or with relation_heads other heads$",
    ):
        build_student(tiny_config(), layers=1, hidden=18, seed=0)


def test_heads_of_an_odd_size_where_they_are_rotated():
    with pytest.raises(ModelError) as caught:
        student_shape(shape_of(tiny_config("modernbert")), layers=1, hidden=20)
    assert str(caught.value) == (
        "hidden size 20 gives 4 heads of an odd size, 5, and modernbert rotates their dimensions in pairs;"
        " choose a multiple of 8"
    )
    assert student_shape(shape_of(tiny_config("bert")), layers=1, hidden=20).hidden == 20


def test_a_student_with_more_layers_than_a_teacher_of_several_layer_types():
    with pytest.raises(
        ModelError, match=r"^a modernbert student has at most the layers of its teacher, 4, not 5$"
    ):
        build_student(tiny_config("modernbert"), layers=5, hidden=16, seed=0)


def test_weights_that_are_missing_or_pickled(tmp_path):
    with pytest.raises(ModelError, match=r"^cannot read the config of "):
        load_encoder(tmp_path / "nowhere")
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has its weights in pytorch_model.bin only, a pickle") as caught:
        load_encoder(tmp_path)
    _, _, command = str(caught.value).partition("make a model.safetensors of it: ")
    assert "\n" not in command
    subprocess.run(["/bin/sh", "-c", command.replace("python", sys.executable, 1)], check=True)  # as typed
    assert weights_digest(tmp_path) == weights_digest(tiny_model().state_dict())
    load_encoder(tmp_path)
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a bert encoder \(encoder.layer.2"):
        load_encoder(tmp_path)


def test_a_mask_of_another_shape():
    encoder = TappedEncoder(tiny_model(), 1)
    with pytest.raises(ModelError, match=r"^mask is torch.bool \[3, 8\]; for input_ids \[3, 9\] it must be"):
        encoder(batch()[0], torch.ones(3, 8, dtype=torch.bool))


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_student_with_dropout_trains_in_bfloat16_on_a_cpu(architecture, padded):
    teacher = TappedEncoder(tiny_model(architecture), LAYERS)
    model = build_student(teacher.model.config, layers=2, hidden=16, dropout=0.1, seed=0)
    distiller = Distiller(teacher, {"s": TappedEncoder(model, 2)}, Objective.named("minilm")).train()
    ids, mask = batch()
    mask = mask if padded else None
    with torch.autocast("cpu", torch.bfloat16):
        sums = distiller.term_sums("s", distiller.teacher_forward(ids, mask), ids, mask, dropout_seed=1)
    sums.sum().backward()
    trained = distiller.trained_parameters("s").values()
    assert sums.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
