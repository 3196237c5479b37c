"""Encoders by their configs alone: which architectures work, their sizes, the layers that can be tapped.

One table names the architectures and what their config calls things; `tapped_encoder` does the rest.
Imports no modelling code (seconds), so that whoever only checks a stage need not have it.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from minilm.model.errors import ModelError, one_line


@dataclass(frozen=True)
class Family:
    """What an architecture's config calls the feed-forward width and the dropout rates, and its reserved
    positions."""

    ffn: str = "intermediate_size"
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    positions_after_padding: bool = False  # position ids begin at pad_token_id + 1 (RoBERTa and its kin)
    rotary: bool = False  # positions are rotations of pairs: head sizes must be even
    attention: str = "sdpa"  # what transformers can build it with; the tap makes SDPA of either


_ROBERTA = Family(positions_after_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family(),
    "distilbert": Family(ffn="hidden_dim", dropout=("dropout", "attention_dropout")),
    "modernbert": Family(dropout=("embedding_dropout", "mlp_dropout", "attention_dropout"), rotary=True),
    "eurobert": Family(dropout=("attention_dropout",), rotary=True),
    "nomic_bert": Family(rotary=True),
    "mpnet": Family(positions_after_padding=True, attention="eager"),
}


@dataclass(frozen=True)
class EncoderShape:
    """An encoder by its numbers. max_tokens: the longest row it takes."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab_size: int
    max_tokens: int


def load_config(path_or_hub_id: str | Path) -> PreTrainedConfig:
    """The config at a folder or hub id. ModelError when there is none, or it is of no encoder that has a tap."""
    name = str(path_or_hub_id)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the config of {name} ({one_line(error)}); give a folder with a config.json, or a hub id "
            f"that this machine can reach"
        ) from error
    family_of(config)
    return config


def family_of(config: PreTrainedConfig) -> Family:
    """ModelError for an architecture without a tap, and for a decoder."""
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
    reserved = config.pad_token_id + 1 if family.positions_after_padding else 0
    return EncoderShape(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=getattr(config, family.ffn),
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings - reserved,
    )


def student_config(
    teacher: PreTrainedConfig,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    dropout: float = 0.1,
) -> PreTrainedConfig:
    """The config of a student of the teacher's architecture and vocabulary.

    heads: the teacher's unless given. ffn: 4 x hidden unless given. dropout: of hidden states and attention alike.
    ModelError for sizes that make no encoder.
    """
    family = family_of(teacher)
    heads = heads or teacher.num_attention_heads
    if layers < 1 or hidden < 1:
        raise ModelError(
            f"a student needs at least 1 layer and a hidden size of 1, not {layers} and {hidden}"
        )
    if hidden % heads:
        raise ModelError(
            f"{heads} heads do not divide hidden size {hidden}; choose a hidden size that is a multiple"
        )
    if family.rotary and hidden // heads % 2:
        raise ModelError(
            f"{teacher.model_type} turns pairs of numbers in every head, and {hidden} / {heads} = {hidden // heads} is "
            f"odd; choose a hidden size that is a multiple of {2 * heads}"
        )
    values = teacher.to_dict()
    for stale in (
        "head_dim",
        "num_key_value_heads",
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
    ):
        values.pop(stale, None)
    aliases = teacher.attribute_map
    for name, value in (
        ("num_hidden_layers", layers),
        ("hidden_size", hidden),
        ("num_attention_heads", heads),
        (family.ffn, ffn or 4 * hidden),
        *((rate, dropout) for rate in family.dropout),
    ):
        values[aliases.get(name, name)] = value
    if values.get("embedding_size") == teacher.hidden_size:
        values["embedding_size"] = hidden
    if values.get("layer_types"):  # the last layer stays as global as the teacher's
        if layers > len(values["layer_types"]):
            raise ModelError(
                f"a {teacher.model_type} student has at most the layers of its teacher,"
                f" {len(values['layer_types'])}, not {layers}"
            )
        values["layer_types"] = values["layer_types"][-layers:]
    return type(teacher)(**values)


def tapped_layer(config: PreTrainedConfig, layer: int | str) -> int:
    """`layer` as a number from 1 to the number of layers; ModelError when it does not exist or sees a window
    only."""
    num_layers = config.num_hidden_layers
    number = num_layers if layer == "last" else layer
    if not isinstance(number, int) or not 1 <= number <= num_layers:
        raise ModelError(
            f'layer {layer!r} does not exist; {config.model_type} has layers 1 to {num_layers}, or "last"'
        )
    types = getattr(config, "layer_types", None)
    if types and types[number - 1] != "full_attention":
        whole = ", ".join(str(i + 1) for i, kind in enumerate(types) if kind == "full_attention")
        raise ModelError(
            f"layer {number} of this {config.model_type} attends to a window only;"
            f" tap one that sees all: {whole}"
        )
    return number


def picked_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layer (1-based) that each student layer starts from: 12 -> 6 gives 2, 4, 6, 8, 10, 12."""
    if student_layers > teacher_layers:
        raise ModelError(f"{student_layers} student layers cannot start from {teacher_layers} teacher layers")
    return [-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1)]
