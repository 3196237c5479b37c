"""Encoders with weights: load a teacher, build a student.

What a config alone tells of an encoder is in shape.py; tapped_encoder.py taps it.
Leaves out: decoders, checkpoints that need code of their own, pickled weights (safetensors only). Invariant:
building a student draws from a generator of its own and leaves the global random state untouched, so its
weights depend on the config and the seed alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from minilm.model.encoder.shape import (
    EncoderShape,
    family_of,
    load_config,
    plain_config,
    shape_of,
    student_shape,
    tapped_layer,
)
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.encoder.weights import check_folder, check_loaded
from minilm.model.errors import ModelError, one_line


def load_encoder(
    path_or_hub_id: str | Path, *, layer: int | str = "last", head: bool = False
) -> TappedEncoder:
    """The encoder at a folder or hub id, in float32 and eval mode, tapped at `layer` (1-based, or "last").

    Weights come from safetensors only. head: keep the checkpoint's masked-language-model head; other heads are not
    loaded. ModelError when the folder or file is missing, the architecture has no tap, the layer does not exist, or
    the weights are not those of its config (weights.py).
    """
    config = load_config(path_or_hub_id)
    number = tapped_layer(config, layer)
    name = str(path_or_hub_id)
    if Path(name).is_dir():
        check_folder(Path(name))
    try:
        with quiet_transformers():
            model, report = (AutoModelForMaskedLM if head else AutoModel).from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=family_of(config).attention,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (
        Exception
    ) as error:  # transformers raises whatever its modules do for values that they did not expect
        raise ModelError(
            f"cannot load {name} as a {config.model_type} ({_said(error)}); give a folder whose config.json and"
            " model.safetensors save_pretrained wrote"
        ) from error
    check_loaded(name, model, report, head=head)
    return TappedEncoder(model.eval(), number)


def _said(error: Exception) -> str:
    text = one_line(error)
    return text if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {text}"


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
    max_tokens: int | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """A randomly initialised encoder of the teacher's architecture and vocabulary, float32, in train mode.

    Its sizes are those of `student_shape`, which also says what is refused. dropout: of hidden states and attention
    alike. max_tokens: the longest row that it takes, the teacher's unless given. device: "cpu", where `seed` gives the
    weights, or "meta", where there are none.
    """
    shape = student_shape(
        shape_of(teacher_config), layers=layers, hidden=hidden, heads=heads, ffn=ffn, max_tokens=max_tokens
    )
    return random_encoder(_resize(teacher_config, shape, dropout), seed=seed, head=head, device=device)


def random_encoder(
    config: PreTrainedConfig, *, seed: int, head: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """An encoder of this very config with random weights, float32, in train mode. device: as of `build_student`."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        build = AutoModelForMaskedLM if head else AutoModel
        attention = family_of(config).attention
        model = build.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.train()


def _resize(teacher: PreTrainedConfig, shape: EncoderShape, dropout: float) -> PreTrainedConfig:
    family = family_of(teacher)
    values = plain_config(teacher).to_dict()
    for own in ("head_dim", "num_key_value_heads", "architectures", "transformers_version", "dtype"):
        values.pop(own, None)
    reserved = family.reserved_positions(teacher.pad_token_id)
    aliases = teacher.attribute_map
    for name, value in (
        ("num_hidden_layers", shape.layers),
        ("hidden_size", shape.hidden),
        ("num_attention_heads", shape.heads),
        (family.ffn, shape.ffn),
        ("max_position_embeddings", shape.max_tokens + reserved),
        *((rate, dropout) for rate in family.dropout),
    ):
        values[aliases.get(name, name)] = value
    if "embedding_size" in values:
        values["embedding_size"] = shape.embedding
    if shape.layer_types:
        values["layer_types"] = list(shape.layer_types)
    return type(teacher)(**values)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and reports of unused weights: the caller checks what was loaded itself."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def count_parameters(module: torch.nn.Module) -> int:
    """All parameters of the module, each once."""
    return sum(p.numel() for p in module.parameters())
