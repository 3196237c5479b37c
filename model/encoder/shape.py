"""Encoders by their configs alone: their sizes, the layers that can be tapped, the sizes a student may have.

What differs between architectures is in families.py. Imports no modelling code, which takes seconds.
"""

import copy
import json
import re
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from minilm.model.encoder.families import FAMILIES, Family
from minilm.model.errors import ModelError, one_line


@dataclass(frozen=True)
class EncoderShape:
    """An encoder by its numbers.

    max_tokens: the longest row it takes. embedding: the width of its tables of tokens and positions, None for `hidden`.
    layer_types: transformers' name for what each layer attends to; empty where
    all layers attend to all tokens. position_bias: see `Family`. has_head: whether it has a masked-language-model
    head; None where the config does not say.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab_size: int
    max_tokens: int
    layer_types: tuple[str, ...] = ()
    position_bias: bool = False
    has_head: bool | None = None
    embedding: int | None = None

    def tapped_layer(self, layer: int | str) -> int:
        """`layer` (from 1, or "last") as a number; ModelError when it does not exist or attends to a window only."""
        number = self.layers if layer == "last" else layer
        if not isinstance(number, int) or not 1 <= number <= self.layers:
            raise ModelError(
                f'layer {layer!r} does not exist; {self.architecture} has layers 1 to {self.layers}, or "last"'
            )
        if self.layer_types and self.layer_types[number - 1] != "full_attention":
            whole = ", ".join(
                str(i + 1) for i, kind in enumerate(self.layer_types) if kind == "full_attention"
            )
            raise ModelError(
                f"layer {number} of this {self.architecture} attends to a window only;"
                f" tap one that sees all: {whole}"
            )
        return number


def load_config(path_or_hub_id: str | Path) -> PreTrainedConfig:
    """The config at a folder or hub id, cut down to what describes an encoder (`plain_config`).

    ModelError when there is none, its architecture has no tap, or a value in it describes no encoder.
    """
    name = str(path_or_hub_id)
    where = f"{name}/config.json" if Path(name).is_dir() else f"the config of {name}"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ModelError(f"{where}: {_wrong_field(where, error)}") from error
    except Exception as error:  # whatever is in the file reaches code that expects numbers
        raise ModelError(
            f"cannot read the config of {name} ({one_line(error)}); give a folder with a config.json, or a hub id "
            f"that this machine can reach"
        ) from error
    family_of(config)
    for problem in _problems(config):
        raise ModelError(f"{where}: {problem}")
    return plain_config(config)


def _wrong_field(where: str, error: Exception) -> str:
    """What is wrong with one key, as transformers' types of a config see it."""
    text = " ".join(str(error).split())
    field, expected = (
        re.search(r"for field '(\w+)'", text),
        re.search(r"(?:expected|<class ')\s*'?(\w+)", text),
    )
    if field is None:
        return f"{one_line(error)}; give the config that was saved with the model"
    allowed = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    kind = expected[1] if expected else ""
    given = ""
    with suppress(OSError, ValueError):
        given = f" is {json.dumps(json.loads(Path(where).read_text(encoding='utf-8'))[field[1]])[:60]}"
    return f"{field[1]}{given or ' has a wrong type'}; it must be {allowed.get(kind, kind)}"


def _problems(config: PreTrainedConfig) -> list[str]:
    """What in a config, each value of which has the right type, describes no encoder that can be tapped."""
    family, aliases = family_of(config), config.attribute_map
    found = []
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", family.ffn)
    for key in (
        *sizes,
        "max_position_embeddings",
        "type_vocab_size",
        "num_key_value_heads",
        "embedding_size",
    ):
        value = getattr(config, key, 1)
        if not isinstance(value, int) or value < 1:
            found.append(
                f"{aliases.get(key, key)} is {_shown(value)}; it must be a whole number of at least 1"
            )
    if found:
        return found
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_size = getattr(config, "head_dim", None) or hidden // heads
    if hidden % heads:
        found.append(
            f"{aliases.get('hidden_size', 'hidden_size')} {hidden} is no multiple of the {heads} heads; give the"
            " config that was saved with the model"
        )
    elif family.rotary and head_size % 2:
        found.append(f"heads of an odd size, {head_size}, cannot be rotated in pairs; give another teacher")
    groups = getattr(config, "num_key_value_heads", heads)
    if heads % groups:
        found.append(f"num_key_value_heads {groups} does not divide the {heads} heads")
    pad = config.pad_token_id
    if pad is None and family.positions_after_padding and family.padding is None:
        found.append(
            f"pad_token_id is null; positions of a {config.model_type} begin behind it, so it must be a number"
        )
    if pad is not None and not 0 <= pad < config.vocab_size:
        found.append(
            f"pad_token_id {pad} is not in the vocabulary; it must be from 0 to {config.vocab_size - 1}"
        )
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method") or "of an unnamed method"
        found.append(
            f"quantization_config ({method}) says that the weights are quantised; give the model in float32, float16"
            " or bfloat16 that it was made from"
        )
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind not in ("absolute", "rope", "rotary"):
        found.append(
            f"position_embedding_type is {kind!r}, which transformers no longer computes; give a teacher with absolute"
            " positions"
        )
    return found


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except TypeError:
        return repr(value)[:60]


_OF_TASKS = frozenset(
    {
        "use_cache",
        "is_decoder",
        "add_cross_attention",
        "pretraining_tp",
        "deterministic_flash_attn",
        "qa_dropout",
        "seq_classif_dropout",
    }
)


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with what its architecture declares and nothing else.

    Left out: what a task added (labels, extra outputs, caches, classifier heads), pruned heads, chunking, quantisation,
    names of code that does not travel with the weights. `architectures` stays: it tells of a head.
    """
    declared = {field.name for field in fields(type(config))}
    declared -= {field.name for field in fields(PreTrainedConfig)} | _OF_TASKS
    values = {
        name: copy.deepcopy(getattr(config, name))
        for name in declared
        if not name.startswith(("classifier_", "summary_", "sparse_pred"))
    }
    plain = type(config)(**values)
    plain.architectures = config.architectures
    return plain


def family_of(config: PreTrainedConfig) -> Family:
    """The row of the config's architecture. ModelError when there is none, or the config is a decoder's."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"architecture {config.model_type!r} has no tap; these have: {', '.join(FAMILIES)}")
    if getattr(config, "is_decoder", False):
        raise ModelError(
            f"this {config.model_type} is configured as a decoder; distillation needs an encoder"
        )
    return family


def shape_of(config: PreTrainedConfig) -> EncoderShape:
    """The shape that a config describes."""
    family = family_of(config)
    return EncoderShape(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=getattr(config, family.ffn),
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings - family.reserved_positions(config.pad_token_id),
        layer_types=tuple(getattr(config, "layer_types", None) or ()),
        position_bias=family.position_bias,
        has_head=_has_head(config),
        embedding=getattr(config, "embedding_size", None),
    )


def student_shape(
    teacher: EncoderShape,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    has_head: bool = False,
    max_tokens: int | None = None,
) -> EncoderShape:
    """The shape of a student of this teacher, as `build_student` builds it. ModelError for sizes that do not fit.

    heads, max_tokens: the teacher's unless given. ffn: hidden size times the family's ratio, or the teacher's, unless
    given.
    """
    family = FAMILIES[teacher.architecture]
    heads = heads or teacher.heads
    if layers < 1 or hidden < 1:
        raise ModelError(
            f"a student needs at least 1 layer and a hidden size of 1, not {layers} and {hidden}"
        )
    if hidden % heads:
        unit = 2 * heads if family.rotary else heads
        raise ModelError(
            f"{heads} heads do not divide hidden size {hidden}; give a multiple of {unit}, or with relation_heads"
            " other heads"
        )
    if family.rotary and hidden // heads % 2:
        raise ModelError(
            f"hidden size {hidden} gives {heads} heads of an odd size, {hidden // heads}, and {teacher.architecture}"
            f" rotates their dimensions in pairs; choose a multiple of {2 * heads}"
        )
    if teacher.layer_types and layers > len(teacher.layer_types):
        raise ModelError(
            f"a {teacher.architecture} student has at most the layers of its teacher,"
            f" {len(teacher.layer_types)}, not {layers}"
        )
    return replace(
        teacher,
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=ffn or _default_ffn(family, teacher, hidden),
        layer_types=teacher.layer_types[-layers:],  # the last layer attends as the teacher's last does
        has_head=has_head,
        max_tokens=max_tokens or teacher.max_tokens,
        embedding=hidden if teacher.embedding == teacher.hidden else teacher.embedding,
    )


def _default_ffn(family: Family, teacher: EncoderShape, hidden: int) -> int:
    """By the family's ratio; by the teacher's, to the next multiple of 8, where the family has none."""
    if family.ffn_ratio is not None:
        return int(family.ffn_ratio * hidden)
    exact = -(-teacher.ffn * hidden // teacher.hidden)
    return exact if hidden >= teacher.hidden else min(-(-exact // 8) * 8, teacher.ffn)


def tapped_layer(config: PreTrainedConfig, layer: int | str) -> int:
    """`EncoderShape.tapped_layer` for a config."""
    return shape_of(config).tapped_layer(layer)


def _has_head(config: PreTrainedConfig) -> bool | None:
    """What the config says of the model that was saved with it; a `…ForPreTraining` may have the head or not."""
    saved = config.architectures or ()
    if any(name.endswith("ForMaskedLM") for name in saved):
        return True
    return None if not saved or any(name.endswith("ForPreTraining") for name in saved) else False
