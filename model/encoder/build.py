"""Encoders with weights: load a teacher, build a student.

What an encoder is by its config alone is in `encoder.shape`; `tapped_encoder` taps it.
Leaves out: decoders, checkpoints that need code of their own, pickled weights (safetensors only). Invariant:
building a student draws from a generator of its own and leaves the global random state untouched, so its
weights depend on the config and the seed alone.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from minilm.model.encoder.quiet import quiet_transformers
from minilm.model.encoder.shape import FAMILIES, load_config, student_config, tapped_layer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError, one_line


def load_encoder(
    path_or_hub_id: str | Path, *, layer: int | str = "last", head: bool = False
) -> TappedEncoder:
    """The encoder at a folder or hub id, in float32 and eval mode, tapped at `layer` (1-based, or "last").

    Weights come from safetensors only. Heads of the checkpoint are left behind, but for the
    masked-language-model head with `head`. ModelError when
    the folder or file is missing, the architecture has no tap, the layer does not exist, or weights are
    missing.
    """
    config = load_config(path_or_hub_id)
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
            f"cannot load the weights of {name}: {one_line(error)}; a model.safetensors is needed"
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

    The sizes are those of `student_config`.
    """
    config = student_config(
        teacher_config, layers=layers, hidden=hidden, heads=heads, ffn=ffn, dropout=dropout
    )
    attention = FAMILIES[config.model_type].attention
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        build = AutoModelForMaskedLM if head else AutoModel
        model = build.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.train()


def count_parameters(module: torch.nn.Module) -> int:
    """All parameters of the module, each once."""
    return sum(p.numel() for p in module.parameters())
