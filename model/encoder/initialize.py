"""Where a student's weights start: at random (the default, as in the papers) or from layers of its teacher.

Random is what `build_student` gives. `from_teacher` copies the teacher's embeddings and, for student layer i
of M, teacher layer round-up(i · L / M): a uniform pick that ends at the teacher's last layer. A narrower
student takes a stated slice: of every hidden and feed-forward dimension the leading entries, and of every
head its leading entries (head by head, so that heads stay heads). Weights that the teacher does not hold keep
their random start.
"""

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.model.encoder.shape import picked_layers
from minilm.model.errors import ModelError

_LAYER = re.compile(r"^(.*?\blayers?\.)(\d+)(\..*)$")
# Rows (dimension 0) of these are heads x head size; of the output projection it is the columns (dimension 1).
_HEAD_ROWS = re.compile(r"\.(query|key|value|q_lin|k_lin|v_lin|q_proj|k_proj|v_proj|q|k|v)\.(weight|bias)$")
_HEAD_COLUMNS = re.compile(r"\.(attention\.output\.dense|out_lin|o_proj|attn\.o)\.weight$")


INITIALIZATIONS = ("random", "teacher-layers")


def initialize(student: PreTrainedModel, teacher: PreTrainedModel, how: str) -> None:
    """Give a student, built at random, the start that a recipe names: one of `INITIALIZATIONS`."""
    if how not in INITIALIZATIONS:
        raise ModelError(f"initialisation {how!r} is not known; use one of {', '.join(INITIALIZATIONS)}")
    if how == "teacher-layers":
        from_teacher(student, teacher)


@torch.no_grad()
def from_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Copy (a slice of) the teacher's weights into the student, in place; returns the names that were copied.

    ModelError when the architectures or head counts differ, or the student is deeper or wider than the
    teacher.
    """
    t, s = teacher.config, student.config
    if t.model_type != s.model_type:
        raise ModelError(f"a {s.model_type} student cannot start from the layers of a {t.model_type} teacher")
    if t.num_attention_heads != s.num_attention_heads:
        raise ModelError(
            f"{s.num_attention_heads} student heads cannot start from {t.num_attention_heads} teacher heads;"
            " give both the same number"
        )
    if s.model_type == "modernbert" and s.hidden_size != t.hidden_size:
        raise ModelError(
            "modernbert keeps q, k and v in one matrix: no slice is defined; give both one hidden size"
        )
    picked = picked_layers(t.num_hidden_layers, s.num_hidden_layers)
    source = teacher.state_dict()
    copied = []
    for name, target in student.state_dict().items():
        match = _LAYER.match(name)
        origin = f"{match[1]}{picked[int(match[2])] - 1}{match[3]}" if match else name
        if origin in source:
            target.copy_(_slice(name, source[origin], target.shape, s.num_attention_heads))
            copied.append(name)
    return copied


def _slice(name: str, weight: Tensor, shape: torch.Size, heads: int) -> Tensor:
    head_dim = 0 if _HEAD_ROWS.search(name) else 1 if _HEAD_COLUMNS.search(name) else None
    for dim, size in enumerate(shape):
        if size > weight.shape[dim]:
            raise ModelError(
                f"{name} is {list(shape)} in the student and {list(weight.shape)} in the teacher: wider"
            )
        if dim == head_dim:
            weight = (
                weight.unflatten(dim, (heads, -1)).narrow(dim + 1, 0, size // heads).flatten(dim, dim + 1)
            )
        else:
            weight = weight.narrow(dim, 0, size)
    return weight
