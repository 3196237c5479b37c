"""Where a student's weights start: at random (the default, as in the papers) or from layers of its teacher.

Random is what `build_student` gives. `from_teacher` copies the teacher's embeddings and, for student layer i of M,
teacher layer round-up(i · L / M): a uniform pick that ends at the teacher's last layer. A narrower student takes a
slice of each matrix, block by block as the family divides it (see `families.Blocks`): the leading entries of a plain
block, and of each head its leading entries, so that heads stay heads. Of a rotated head it takes whole pairs, evenly
spaced, because pair i of d rotates with frequency base^(-i/d): with half the pairs, pair i turns as the teacher's
pair 2i does. Where the teacher's queries share keys and values in groups, each student head starts from its group's.
Weights that the teacher does not hold keep their random start.

Rows of `seq_len` tokens train the first `seq_len` rows of a table of positions and no others. What becomes of the rest
is one of `POSITIONS`: `cut`, the table ends there; `teacher`, they are the teacher's, in a table that starts as the
teacher's; `keep`, they stay as they start. Families that rotate have no table.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minilm.model.encoder.families import FAMILIES, PLAIN, ROTARY
from minilm.model.encoder.shape import EncoderShape, family_of, shape_of
from minilm.model.errors import ModelError

if TYPE_CHECKING:  # a recipe is checked without modelling code
    from transformers import PreTrainedModel

INITIALIZATIONS = ("random", "teacher-layers", "teacher-pca")
POSITIONS = ("cut", "teacher", "keep")
_TABLE = "position_embeddings.weight"
_LAYER = re.compile(r"^(.*?\blayers?\.)(\d+)(\..*)$")


def check_start(teacher: EncoderShape, student: EncoderShape, how: str) -> None:
    """ModelError unless a student of this shape can have the start that a recipe names, one of `INITIALIZATIONS`."""
    if how not in INITIALIZATIONS:
        raise ModelError(f"initialisation {how!r} is not known; use one of {', '.join(INITIALIZATIONS)}")
    if how == "random":
        return
    t, s = teacher, student
    if t.architecture != s.architecture:
        raise ModelError(
            f"a {s.architecture} student cannot start from the layers of a {t.architecture} teacher"
        )
    picked_layers(t.layers, s.layers)
    if t.heads != s.heads:
        raise ModelError(
            f"{s.heads} student heads cannot start from {t.heads} teacher heads; give both the same number"
        )
    for what, own, theirs in (("hidden", s.hidden, t.hidden), ("feed-forward", s.ffn, t.ffn)):
        if own > theirs:
            raise ModelError(
                f"a {what} size of {own} cannot start from the teacher's {theirs}; give {theirs} or less, or"
                " start at random"
            )
    if how == "teacher-pca" and s.hidden < t.hidden and (s.ffn, t.ffn) == (s.hidden, t.hidden):
        raise ModelError(
            f"teacher-pca can't tell a feed-forward size of {s.ffn} from the hidden size, which is the same; give the"
            " student another ffn, or init: teacher-layers"
        )


def check_positions(teacher: EncoderShape, student: EncoderShape, positions: str, init: str) -> None:
    """ModelError unless the student's positions can be what a recipe says, one of `POSITIONS`."""
    if positions not in POSITIONS:
        raise ModelError(f"positions {positions!r} are not known; use one of {', '.join(POSITIONS)}")
    own, theirs = student.embedding or student.hidden, teacher.embedding or teacher.hidden
    if positions == "teacher" and has_table(teacher) and init == "random" and own != theirs:
        raise ModelError(
            f"its table of positions is {own} wide and the teacher's {theirs}, so none can be copied; give hidden:"
            f" {theirs}, or positions: cut"
        )


def has_table(shape: EncoderShape) -> bool:
    """Whether the family learns a vector for each position, rather than to rotate."""
    return not FAMILIES[shape.architecture].rotary


def initialize(
    student: "PreTrainedModel", teacher: "PreTrainedModel", how: str, positions: str = "cut"
) -> None:
    """Give a student, built at random, the start that a recipe names, but teacher-pca, which needs rows
    (principal_start.py). Raises as `check_start` does."""
    check_start(shape_of(teacher.config), shape_of(student.config), how)
    assert how != "teacher-pca", "see driver/made_starts.py"
    if how == "teacher-layers":
        from_teacher(student, teacher)
    elif positions == "teacher":
        copy_positions(student, teacher)


@torch.no_grad()
def copy_positions(student: "PreTrainedModel", teacher: "PreTrainedModel", first: int = 0) -> None:
    """Copy the teacher's vectors of positions `first` (from 0, as in a row) and on, a slice for a narrower student."""
    config = student.config
    reserved = family_of(config).reserved_positions(config.pad_token_id) if first else 0
    theirs = dict(teacher.named_parameters())
    for name, table in student.named_parameters():
        if name.endswith(_TABLE):
            table[first + reserved :] = theirs[name][first + reserved : len(table), : table.shape[1]]


def picked_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layer (1-based) that each student layer starts from: 12 -> 6 gives 2, 4, 6, 8, 10, 12."""
    if student_layers > teacher_layers:
        raise ModelError(
            f"{student_layers} student layers cannot start from {teacher_layers} teacher layers; give"
            f" {teacher_layers} or fewer, or start at random"
        )
    return [-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1)]


@torch.no_grad()
def from_teacher(student: "PreTrainedModel", teacher: "PreTrainedModel") -> list[str]:
    """Copy (a slice of) the teacher's weights into the student, in place; returns the names that were copied.

    ModelError when the architectures or head counts differ, or the student is deeper or wider than the teacher.
    """
    check_start(shape_of(teacher.config), shape_of(student.config), "teacher-layers")
    family, sizes = family_of(student.config), head_sizes(teacher, student)
    picked = picked_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    source = teacher.state_dict()
    copied = []
    for name, target in student.state_dict().items():
        origin = teachers_name(name, picked)
        if origin not in source:
            continue
        weight = source[origin]
        blocks = family.blocks(name.rpartition(".")[0])
        for dim, kinds in enumerate((blocks.rows, blocks.columns)[: weight.dim()]):
            weight = cut(weight, dim, kinds, target.shape[dim], *sizes)
        target.copy_(weight)
        copied.append(name)
    return copied


def teachers_name(name: str, picked: list[int]) -> str:
    """What a student's module or weight is called in its teacher. picked: of `picked_layers`."""
    match = _LAYER.match(name)
    return f"{match[1]}{picked[int(match[2])] - 1}{match[3]}" if match else name


def head_sizes(teacher: "PreTrainedModel", student: "PreTrainedModel") -> tuple[int, int]:
    """How many dimensions a head has, in the teacher and in a student with as many heads."""
    own, theirs = student.config, teacher.config
    heads = own.num_attention_heads
    return getattr(theirs, "head_dim", None) or theirs.hidden_size // heads, own.hidden_size // heads


def cut(
    weight: Tensor, dim: int, kinds: tuple[str, ...], size: int, teacher_head: int, student_head: int
) -> Tensor:
    """`weight` cut to `size` along `dim`, which is made of equal blocks of these kinds; *_head: sizes of a head."""
    parts = []
    for kind, block in zip(kinds, weight.chunk(len(kinds), dim), strict=True):
        if kind == PLAIN:
            parts.append(block.narrow(dim, 0, size // len(kinds)))
            continue
        split = block.unflatten(dim, (-1, teacher_head))
        heads = size // len(kinds) // student_head
        split = split.repeat_interleave(heads // split.shape[dim], dim)
        kept = _rotary_pairs(teacher_head, student_head) if kind == ROTARY else torch.arange(student_head)
        parts.append(split.index_select(dim + 1, kept.to(weight.device)).flatten(dim, dim + 1))
    return torch.cat(parts, dim)


def _rotary_pairs(teacher_head: int, student_head: int) -> Tensor:
    """The dimensions of a teacher's head that a student's takes: whole pairs (i, i + half), evenly spaced."""
    half = student_head // 2
    first = torch.arange(half) * (teacher_head // 2) // half
    return torch.cat((first, first + teacher_head // 2))
