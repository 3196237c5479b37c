"""Encoders by name: load a teacher, build a student, look at a shape without reading weights.

One table names the architectures that work and what their config calls things; `model.tap` does the rest.
Leaves out: decoders, checkpoints that need code of their own, pickled weights (safetensors only). Invariant:
building a student draws from a generator of its own and leaves the global random state untouched, so its
weights depend on the config and the seed alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from model.errors import ModelError
from model.quiet import quiet_transformers
from model.tap import TappedEncoder, Taps

__all__ = [
    "FAMILIES",
    "EncoderShape",
    "TappedEncoder",
    "Taps",
    "build_student",
    "count_parameters",
    "inspect_encoder",
    "load_encoder",
    "shape_of",
    "tapped_layer",
]


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
    """An encoder by its numbers. `parameters` counts all of the base model, `transformer_parameters` its
    layers."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab_size: int
    max_tokens: int
    parameters: int
    transformer_parameters: int


def load_encoder(
    path_or_hub_id: str | Path, *, layer: int | str = "last", head: bool = False
) -> TappedEncoder:
    """The encoder at a folder or hub id, in float32 and eval mode, tapped at `layer` (1-based, or "last").

    Weights come from safetensors only. Heads of the checkpoint are left behind, but for the
    masked-language-model head with `head`. ModelError when
    the folder or file is missing, the architecture has no tap, the layer does not exist, or weights are
    missing.
    """
    config = _load_config(path_or_hub_id)
    number = tapped_layer(config, layer)
    name = str(path_or_hub_id)
    try:
        with quiet_transformers():
            model, report = (AutoModelForMaskedLM if head else AutoModel).from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=FAMILIES[config.model_type].attention,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"cannot load the weights of {name}: {_one_line(error)}; a model.safetensors is needed"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if ".pooler." not in f".{key}")
    if missing:
        kind = f"a {config.model_type} encoder" + (" with its head" if head else "")
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {kind} ({missing[0]}, …); give the folder that its"
            " save_pretrained wrote"
        )
    return TappedEncoder(model.eval(), number)


def build_student(
    teacher_config: PreTrainedConfig,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    dropout: float = 0.1,
    seed: int,
    head: bool = False,
) -> PreTrainedModel:
    """A randomly initialised encoder of the teacher's architecture and vocabulary, on CPU, float32, in train
    mode.

    heads: the teacher's unless given. ffn: 4 x hidden unless given. dropout: of hidden states and attention
    alike.
    """
    family = _family(teacher_config)
    heads = heads or teacher_config.num_attention_heads
    if layers < 1 or hidden < 1:
        raise ModelError(
            f"a student needs at least 1 layer and a hidden size of 1, not {layers} and {hidden}"
        )
    if hidden % heads:
        raise ModelError(
            f"{heads} heads do not divide hidden size {hidden}; choose a hidden size that is a multiple"
        )
    config = _resize(teacher_config, layers, hidden, heads, ffn or 4 * hidden, dropout)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        build = AutoModelForMaskedLM if head else AutoModel
        model = build.from_config(config, attn_implementation=family.attention, dtype=torch.float32)
    return model.train()


def inspect_encoder(path_or_hub_id: str | Path) -> EncoderShape:
    """The shape of the encoder at a folder or hub id. Reads its config only."""
    return shape_of(_load_config(path_or_hub_id))


def shape_of(config: PreTrainedConfig) -> EncoderShape:
    """The shape that a config describes; parameters are counted on a model without storage."""
    family = _family(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    reserved = config.pad_token_id + 1 if family.positions_after_padding else 0
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=count_parameters)
    return EncoderShape(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=getattr(config, family.ffn),
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings - reserved,
        parameters=count_parameters(model),
        transformer_parameters=count_parameters(layers),
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


def _resize(
    teacher: PreTrainedConfig, layers: int, hidden: int, heads: int, ffn: int, dropout: float
) -> PreTrainedConfig:
    family = FAMILIES[teacher.model_type]
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
        (family.ffn, ffn),
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


def _load_config(path_or_hub_id: str | Path) -> PreTrainedConfig:
    name = str(path_or_hub_id)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the config of {name}: {_one_line(error)}") from error
    _family(config)
    return config


def _family(config: PreTrainedConfig) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"architecture {config.model_type!r} has no tap; these have: {', '.join(FAMILIES)}")
    if getattr(config, "is_decoder", False):
        raise ModelError(
            f"this {config.model_type} is configured as a decoder; distillation needs an encoder"
        )
    return family


def count_parameters(module: torch.nn.Module) -> int:
    """All parameters of the module, each once."""
    return sum(p.numel() for p in module.parameters())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
