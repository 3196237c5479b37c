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
    attention: str = "sdpa"  # what transformers can build it with; the tap makes SDPA of either


_ROBERTA = Family(positions_after_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family(),
    "distilbert": Family(ffn="hidden_dim", dropout=("dropout", "attention_dropout")),
    "modernbert": Family(dropout=("embedding_dropout", "mlp_dropout", "attention_dropout")),
    "eurobert": Family(dropout=("attention_dropout",)),
    "nomic_bert": Family(),
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
        raise ModelError(f"cannot read the config of {name}: {one_line(error)}") from error
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
