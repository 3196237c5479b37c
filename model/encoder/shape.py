"""Encoders by their configs alone: their sizes, the layers that can be tapped, the sizes a student may have.

What differs between architectures is in families.py. Imports no modelling code, which takes seconds.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from minilm.model.encoder.families import FAMILIES, Family
from minilm.model.errors import ModelError, one_line


@dataclass(frozen=True)
class EncoderShape:
    """An encoder by its numbers.

    max_tokens: the longest row it takes. layer_types: transformers' name for what each layer attends to; empty where
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
    """The config at a folder or hub id. ModelError when there is none, or its architecture has no tap."""
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
    reserved = config.pad_token_id + 1 if family.positions_after_padding else 0
    return EncoderShape(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=getattr(config, family.ffn),
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings - reserved,
        layer_types=tuple(getattr(config, "layer_types", None) or ()),
        position_bias=family.position_bias,
        has_head=_has_head(config),
    )


def student_shape(
    teacher: EncoderShape,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    has_head: bool = False,
) -> EncoderShape:
    """The shape of a student of this teacher, as `build_student` builds it. ModelError for sizes that do not fit.

    heads: the teacher's unless given. ffn: hidden size times the family's ratio unless given.
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
        ffn=ffn or int(family.ffn_ratio * hidden),
        layer_types=teacher.layer_types[-layers:],  # the last layer attends as the teacher's last does
        has_head=has_head,
    )


def tapped_layer(config: PreTrainedConfig, layer: int | str) -> int:
    """`EncoderShape.tapped_layer` for a config."""
    return shape_of(config).tapped_layer(layer)


def _has_head(config: PreTrainedConfig) -> bool | None:
    """What the config says of the model that was saved with it; a `…ForPreTraining` may have the head or not."""
    saved = config.architectures or ()
    if any(name.endswith("ForMaskedLM") for name in saved):
        return True
    return None if not saved or any(name.endswith("ForPreTraining") for name in saved) else False
