"""Teachers as people have them, made tiny: every family, and what is odd about one (test_driver_teachers.py).

`SOUND` are distilled: each row changes a folder that `plain` wrote, and says what its stage adds. `REFUSED` are not:
each row makes a folder wrong and gives the sentence, in which «folder» stands for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from minilm.model.encoder.families import FAMILIES
from tests.conftest import WORDS

VOCAB = len(WORDS) + 6  # with five special tokens and a full stop
Make = Callable[[Path], None]


def plain(folder: Path, tokenizer: Path, kind: str = "bert", model: Any = AutoModel, **changes: Any) -> None:
    """A teacher of 3 layers × 48 of a family, with the tokenizer of another folder."""
    family = FAMILIES[kind]
    values: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 48}
    values |= {"num_attention_heads": 4, family.ffn: 96, "max_position_embeddings": 64, "pad_token_id": 0}
    values |= {"bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
    if kind == "modernbert":  # the last layer sees all
        values |= {"num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
    if kind == "eurobert":
        values |= {"num_key_value_heads": 2, "mask_token_id": 4}
    if kind == "mpnet":  # its code has the padding id, 1, built in
        values |= {"max_position_embeddings": 66}
    if kind == "electra":
        values |= {"embedding_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.from_config(AutoConfig.for_model(kind, **values | changes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)


def edit(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The folder's weights changed in place, or what `change` returns instead."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def add(name: str, *size: int, dtype: torch.dtype = torch.float32) -> Make:
    return lambda folder: weights(folder, lambda tensors: tensors.update({name: torch.ones(size).to(dtype)}))


def in_two_files(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def nothing(folder: Path) -> None: ...


def of_old_names(folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        found = {}
        for name, tensor in tensors.items():
            for new, old in ends.items():
                name = name.replace(new, old)
            found[f"bert.{name}"] = tensor
        return found

    weights(folder, rename)


def without_pooler(folder: Path) -> None:
    weights(folder, lambda t: {name: x for name, x in t.items() if "pooler" not in name})


def of_sentence_transformers(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    edit(folder, "1_Pooling/config.json", word_embedding_dimension=48)
    edit(folder, "sentence_bert_config.json", max_seq_length=16)
    edit(folder, "tokenizer_config.json", model_max_length=16)


def with_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")


SLICED, PROJECTED = {"init": "teacher-layers"}, {"init": "teacher-pca"}
SOFT = {"objective": "soft-label-mlm"}
# name: (family, its class, its config, what is changed then, keys of its student, keys of its stage)
SOUND: dict[str, tuple[str, Any, dict[str, Any], Make, dict[str, Any], dict[str, Any]]] = {
    **{kind.replace("_", "-"): (kind, AutoModel, {}, nothing, {}, {}) for kind in FAMILIES},
    "sliced-modernbert": ("modernbert", AutoModel, {}, nothing, SLICED, {}),
    "sliced-eurobert": ("eurobert", AutoModel, {}, nothing, SLICED, {}),
    "projected": ("bert", AutoModelForMaskedLM, {}, nothing, PROJECTED | {"ffn": 48}, SOFT),
    "projected-positions": (
        "bert",
        AutoModel,
        {},
        nothing,
        PROJECTED | {"positions": "teacher"},
        {"weight_decay": 0.9},  # which shrinks what no row trains
    ),
    "projected-nomic": ("nomic_bert", AutoModel, {}, nothing, PROJECTED, {}),
    "with-head": ("bert", AutoModelForMaskedLM, {}, nothing, {}, {"objective": "soft-label-mlm"}),
    "head-left-out": ("roberta", AutoModelForMaskedLM, {}, nothing, {}, {}),
    "classifier": (
        "bert",
        AutoModelForSequenceClassification,
        {"num_labels": 5, "problem_type": "multi_label_classification", "classifier_dropout": 0.3},
        nothing,
        {},
        {},
    ),
    "asks-for-extras": (
        "bert",
        AutoModel,
        {},
        lambda f: edit(
            f,
            output_attentions=True,
            output_hidden_states=True,
            return_dict=False,
            use_cache=True,
            torchscript=True,
            chunk_size_feed_forward=7,
        ),
        {},
        {},
    ),
    "extras-and-head": (
        "bert",
        AutoModelForMaskedLM,
        {},
        lambda f: edit(f, output_attentions=True, return_dict=False),
        {},
        {"objective": "soft-label-mlm"},
    ),
    "names-code": (
        "nomic_bert",
        AutoModel,
        {},
        lambda f: edit(f, auto_map={"AutoModel": "owner/code--modeling.Model"}, _attn_implementation="flash"),
        {},
        {},
    ),
    "pruned-in-name": ("bert", AutoModel, {}, lambda f: edit(f, pruned_heads={"0": []}), {}, {}),
    "float16": (
        "bert",
        AutoModel,
        {},
        lambda f: weights(f, lambda t: {name: x.half() for name, x in t.items()}),
        {},
        {},
    ),
    "in-two-files": ("bert", AutoModel, {}, in_two_files, {}, {}),
    "old-names": ("bert", AutoModel, {}, of_old_names, {}, {}),
    "position-ids": (
        "bert",
        AutoModel,
        {},
        add("embeddings.position_ids", 1, 64, dtype=torch.int64),
        {},
        {},
    ),
    "without-pooler": ("bert", AutoModel, {}, without_pooler, {}, {}),
    "sentence-transformers": ("bert", AutoModel, {}, of_sentence_transformers, {}, {}),
    "padded-vocabulary": ("bert", AutoModel, {"vocab_size": 128}, nothing, {}, {}),
    "no-pad-id": ("bert", AutoModel, {"pad_token_id": None}, nothing, {}, {}),
    "one-token-type": ("roberta", AutoModel, {"type_vocab_size": 1}, nothing, {}, {}),
    "sinusoidal": ("distilbert", AutoModel, {"sinusoidal_pos_embds": True}, nothing, {}, {}),
    "wide-embeddings": ("electra", AutoModel, {"embedding_size": 48}, nothing, {}, {}),
    "scaled-rotation": (
        "eurobert",
        AutoModel,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        nothing,
        {},
        {},
    ),
    "teachers-positions": ("mpnet", AutoModel, {}, nothing, {"hidden": 48, "positions": "teacher"}, {}),
    "kept-positions": ("roberta", AutoModel, {}, nothing, {"positions": "keep"}, {}),
    "kept-rotation": ("modernbert", AutoModel, {}, nothing, {"positions": "keep"}, {}),
    "chat-template": ("bert", AutoModel, {}, with_chat_template, {}, {}),
}

_SAVED = "give the folder that its save_pretrained wrote"
_MERGE = "merge it (merge_and_unload of peft, then save_pretrained) and give that folder"
_QUERY = "encoder.layer.0.attention.self.query"


def bytes_of(name: str) -> Make:
    return lambda f: weights(f, lambda t: t.update({name: t[name].to(torch.int8)}))


def only_as(name: str) -> Make:
    return lambda f: (f / "model.safetensors").rename(f / name) and None


def not_a_number(folder: Path) -> None:
    weights(folder, lambda t: t.update({"embeddings.LayerNorm.bias": torch.full((48,), float("nan"))}))


# name: (what is changed in a BERT, the sentence)
REFUSED: dict[str, tuple[Make, str]] = {
    "null": (
        lambda f: edit(f, hidden_size=None),
        "«folder»/config.json: hidden_size is null; it must be a whole number",
    ),
    "null-epsilon": (
        lambda f: edit(f, layer_norm_eps=None),
        "«folder»/config.json: layer_norm_eps is null; it must be a number",
    ),
    "null-dropout": (
        lambda f: edit(f, hidden_dropout_prob=None),
        "«folder»/config.json: hidden_dropout_prob is null; it must be a number",
    ),
    "null-token-types": (
        lambda f: edit(f, type_vocab_size=None),
        "«folder»/config.json: type_vocab_size is null; it must be a whole number",
    ),
    "text-for-a-number": (
        lambda f: edit(f, vocab_size="61"),
        '«folder»/config.json: vocab_size is "61"; it must be a whole number',
    ),
    "no-token-types": (
        lambda f: edit(f, type_vocab_size=0),
        "«folder»/config.json: type_vocab_size is 0; it must be a whole number of at least 1",
    ),
    "no-layers": (
        lambda f: edit(f, num_hidden_layers=0),
        "«folder»/config.json: num_hidden_layers is 0; it must be a whole number of at least 1",
    ),
    "no-heads": (
        lambda f: edit(f, num_attention_heads=0),
        "«folder»/config.json: num_attention_heads is 0; it must be a whole number of at least 1",
    ),
    "heads-that-do-not-divide": (
        lambda f: edit(f, num_attention_heads=5),
        "«folder»/config.json: hidden_size 48 is no multiple of the 5 heads; give the config that was saved with the"
        " model",
    ),
    "pad-beyond-the-table": (
        lambda f: edit(f, pad_token_id=99),
        "«folder»/config.json: pad_token_id 99 is not in the vocabulary; it must be from 0 to 60",
    ),
    "unknown-activation": (
        lambda f: edit(f, hidden_act="swoosh"),
        "cannot load «folder» as a bert (KeyError: 'swoosh'); give a folder whose config.json and model.safetensors"
        " save_pretrained wrote",
    ),
    "eight-bits": (
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "«folder»/config.json: quantization_config (bitsandbytes) says that the weights are quantised; give the model"
        " in float32, float16 or bfloat16 that it was made from",
    ),
    "relative-positions": (
        lambda f: edit(f, position_embedding_type="relative_key"),
        "«folder»/config.json: position_embedding_type is 'relative_key', which transformers no longer computes; give a"
        " teacher with absolute positions",
    ),
    "relative-positions-in-the-weights-alone": (
        add("encoder.layer.0.attention.self.distance_embedding.weight", 127, 12),
        "«folder» holds weights inside the encoder that a bert has no place for"
        " (encoder.layer.0.attention.self.distance_embedding.weight); it would be another model without them, so give"
        " another one, or one saved by this version of transformers",
    ),
    "lora": (
        add(f"{_QUERY}.lora_A.default.weight", 4, 48),
        f"«folder» holds an adapter that is not merged into its weights ({_QUERY}.lora_A.default.weight); {_MERGE}",
    ),
    "peft-names": (
        lambda f: weights(f, lambda t: {f"base_model.model.{name}": x for name, x in t.items()}),
        "«folder» holds an adapter that is not merged into its weights (base_model.model.embeddings.LayerNorm.bias, …);"
        f" {_MERGE}",
    ),
    "adapter-beside": (
        lambda f: edit(f, "adapter_config.json", peft_type="LORA"),
        "«folder» holds an adapter (adapter_config.json) beside its model, and distillation would leave it out; merge"
        " it (merge_and_unload of peft, then save_pretrained) and give that folder, or take adapter_config.json away to"
        " distil the model without it",
    ),
    "adapter-alone": (
        lambda f: edit(f, "adapter_config.json", peft_type="LORA") or (f / "config.json").unlink(),
        "«folder» is an adapter (adapter_config.json) without its model; merge it into the model that it was trained on"
        " (merge_and_unload of peft, then save_pretrained) and give that folder",
    ),
    "surplus-layers": (
        lambda f: edit(f, num_hidden_layers=2),
        "«folder» has weights of 3 layers, and its config.json says 2 (encoder.layer.2.attention.output.LayerNorm.bias,"
        " …); give the config.json that was saved with them, or save the shorter model with save_pretrained",
    ),
    "missing-layer": (
        lambda f: edit(f, num_hidden_layers=4),
        "«folder» lacks 16 weights of a bert encoder (encoder.layer.3.attention.output.LayerNorm.bias, …); "
        + _SAVED,
    ),
    "int8": (
        bytes_of(f"{_QUERY}.weight"),
        f"«folder»/model.safetensors: {_QUERY}.weight is stored as I8, so the weights are quantised; give the model in"
        " float32, float16 or bfloat16 that it was made from",
    ),
    "scales": (
        add(f"{_QUERY}.weight_scale", 48),
        f"«folder» holds quantised weights ({_QUERY}.weight_scale); give the model in float32, float16 or bfloat16",
    ),
    "other-sizes": (
        lambda f: edit(f, vocab_size=70, max_position_embeddings=80),
        "«folder»: weights and config.json differ in size: embeddings.position_embeddings.weight is 64 x 48 in the file"
        " and 80 x 48 by the config (max_position_embeddings); embeddings.word_embeddings.weight is 61 x 48 in the file"
        " and 70 x 48 by the config (vocab_size); give the config.json that was saved with these weights",
    ),
    "not-finite": (
        not_a_number,
        "«folder»: weight embeddings.LayerNorm.bias holds numbers that are not finite; give a model whose"
        " training did not diverge",
    ),
    "no-weights": (
        only_as("model.fp16.safetensors"),
        "«folder» has no model.safetensors, only model.fp16.safetensors; " + _SAVED.replace("its ", ""),
    ),
    "pickle": (
        lambda f: (torch.save({}, f / "pytorch_model.bin"), (f / "model.safetensors").unlink())[1],
        "«folder» has its weights in pytorch_model.bin only, a pickle, which is not read here; make a model.safetensors"
        ' of it: python -c "import sys,glob,torch,safetensors.torch as s; ',
    ),
    "damaged": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs") and None,
        "«folder»/model.safetensors is no safetensors file, or damaged; bring it again",
    ),
    "half-an-index": (
        lambda f: (
            in_two_files(f),
            (f / "model.safetensors").unlink(),
            next(f.glob("model-00002*")).unlink(),
        )[0],
        "«folder» lacks model-00002-of-",
    ),
}
