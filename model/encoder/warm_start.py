"""A student that starts from an exported model: it has that model's shape and config, and all its weights.

Unlike `init: teacher-layers` nothing is sliced, so that training goes on where it ended.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minilm.model.encoder.shape import EncoderShape, family_of, load_config
from minilm.model.errors import ModelError

if TYPE_CHECKING:  # a recipe is checked without modelling code
    from transformers import PreTrainedModel


def started_shape(
    teacher: EncoderShape,
    start: EncoderShape,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    any_family: bool = False,
) -> EncoderShape:
    """The shape of a student that starts from a model of shape `start`: the same.

    ModelError where the sizes that are asked for are others, or the family is not the teacher's, unless `any_family`.
    """
    if start.architecture != teacher.architecture and not any_family:
        raise ModelError(
            f"it starts from a {start.architecture} and learns from a {teacher.architecture};"
            " start from a model of the teacher's family (only objective: embedding takes any)"
        )
    asked = {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}
    if wrong := [key for key, size in asked.items() if size not in (None, getattr(start, key))]:
        given = ", ".join(f"{key}: {asked[key]}" for key in wrong)
        theirs = ", ".join(f"{key}: {getattr(start, key)}" for key in wrong)
        raise ModelError(f"given {given}, and the model that it starts from has {theirs}; give {theirs}")
    return start


def load_start(folder: str | Path, *, dropout: float, head: bool, seed: int) -> "PreTrainedModel":
    """The model at `folder` as a student: its config with this dropout, on CPU, float32, in train mode.

    seed: of a pooler that the folder lacks, which distillation does not train. ModelError as `load_encoder` raises it.
    """
    from minilm.model.encoder.build import load_encoder, random_encoder

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        start = load_encoder(folder, head=head).model
    config = load_config(folder)
    config.architectures = None
    for rate in family_of(config).dropout:
        setattr(config, rate, dropout)
    student = random_encoder(config, seed=seed, head=head)
    student.load_state_dict(start.state_dict())
    return student
