"""The checks of `relation_kl`'s arguments: errors name the tensor, both shapes and the way out."""

import torch
from torch import Tensor

from minilm.model.errors import ModelError


def check_relations(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    mask: Tensor | None,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> None:
    """ModelError unless shapes and dtypes fit together as `relation_kl` documents them."""
    named = {"teacher_x": teacher_x, "teacher_y": teacher_y, "student_x": student_x, "student_y": student_y}
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise ModelError(
                f"{name} has shape {_shape(tensor)}; it must be [batch, heads, tokens, head size]"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"{name} is {_dtype(tensor)}; relations need a floating-point dtype")
        if tensor.dtype != student_x.dtype:
            raise ModelError(
                f"{name} is {_dtype(tensor)} but student_x {_dtype(student_x)}; cast to one dtype first"
            )
    for left, right, same in (
        ("teacher_x", "teacher_y", 4),
        ("student_x", "student_y", 4),
        ("teacher_x", "student_x", 3),
    ):
        a, b = named[left], named[right]
        for dim, what in enumerate(("batch", "head", "token", "head-size")[:same]):
            if a.shape[dim] != b.shape[dim]:
                way_out = "; re-split both with relation_heads" if what == "head" else ""
                raise ModelError(
                    f"{left} {_shape(a)} and {right} {_shape(b)} differ in their {what} count:"
                    f" {a.shape[dim]} and {b.shape[dim]}{way_out}"
                )
    batch, heads, tokens, _ = student_x.shape
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ModelError(f"mask is {_dtype(mask)}; it must be torch.bool, True where a token is valid")
        if mask.shape != (batch, tokens):
            raise ModelError(
                f"mask has shape {_shape(mask)} but student_x {_shape(student_x)};"
                f" it must be [{batch}, {tokens}]"
            )
    for name, bias in (("teacher_bias", teacher_bias), ("student_bias", student_bias)):
        if bias is None:
            continue
        full = (batch, heads, tokens, tokens)
        padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(padded) != 4 or any(
            size not in (1, target) for size, target in zip(padded, full, strict=True)
        ):
            raise ModelError(f"{name} has shape {_shape(bias)}; it must broadcast to {list(full)}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype)
