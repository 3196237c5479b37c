"""The divergence between a teacher's and a student's self-attention relations, in readable PyTorch.

    relation(x, y) = softmax(x yᵀ / √d + bias)         over the valid keys of one sequence
    divergence     = KL(teacher's relation ‖ student's), summed over queries, averaged over heads

Source: MiniLM (arXiv 2002.10957) eq. 6-10; with x = y for MiniLMv2 (arXiv 2012.15828) and for value
relations.

Legend of the shape suffixes: B sequences, H heads, T tokens (queries), S tokens (keys), D head size (each
side its own).

Invariants: the softmax is taken in float32 or better whatever the inputs and the autocast state; padded keys
have probability zero on both sides; padded queries and sequences without a valid token contribute neither
value nor gradient, so what stands at padded positions (NaN included) changes nothing; only the student
receives gradients.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from model.errors import ModelError

Reduction = Literal["sequence", "token", "sequence_sum", "token_sum"]
REDUCTIONS = ("sequence", "token", "sequence_sum", "token_sum")


def relation_kl(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    mask: Tensor | None,
    *,
    reduction: str = "sequence",
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """KL divergence between two relations, a scalar in nats (float32; float64 for float64 inputs).

    teacher_x, teacher_y: [batch, heads, tokens, d_T]; student_x, student_y: [batch, heads, tokens, d_S].
    mask: bool [batch, tokens], True where a token is valid, in any layout; None: all are valid.
    teacher_bias, student_bias: broadcastable to [batch, heads, tokens, tokens], added to the scaled scores.
    reduction: "sequence": mean over heads, then over a sequence's valid queries, then over the sequences that
        have a valid token (the paper's). "token": mean over heads and over all valid queries. "sequence_sum",
        "token_sum": the same without the last division, so that micro-batches and workers add up before one
        division by the global `relation_weight`.
    implementation: "reference", or "auto" for the fastest that applies.

    Raises ModelError when shapes, dtypes, reduction or implementation do not fit.
    """
    _check(teacher_x, teacher_y, student_x, student_y, mask, teacher_bias, student_bias)
    if reduction not in REDUCTIONS:
        raise ModelError(f"reduction {reduction!r} is not known; use one of {', '.join(REDUCTIONS)}")
    if implementation not in ("auto", "reference"):
        raise ModelError(f"implementation {implementation!r} is not known; use auto or reference")
    with torch.autocast(student_x.device.type, enabled=False):
        rows_BT = _reference_rows(
            teacher_x.detach(),
            teacher_y.detach(),
            student_x,
            student_y,
            mask,
            None if teacher_bias is None else teacher_bias.detach(),
            student_bias,
        )
        return reduce_rows(rows_BT, mask, reduction)


def relation_maps(x: Tensor, y: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The relation itself, for looking at: probabilities [batch, heads, tokens, tokens], rows over valid
    keys.

    Rows of padded queries are zero. Arguments as in `relation_kl`.
    """
    with torch.autocast(x.device.type, enabled=False):
        maps_BHTS = _log_relation(x, y, bias, mask).exp()
        return maps_BHTS if mask is None else maps_BHTS.masked_fill(~mask[:, None, :, None], 0.0)


def relation_heads(x: Tensor, num_relation_heads: int) -> Tensor:
    """Concatenate the heads and split the result again: [batch, heads, tokens, d] -> [batch, R, tokens,
    heads·d/R].

    MiniLMv2 (arXiv 2012.15828, section 3.1): it makes relations of sides with different head counts
    comparable.
    """
    batch, heads, tokens, head_size = x.shape
    if num_relation_heads < 1 or heads * head_size % num_relation_heads:
        raise ModelError(
            f"{num_relation_heads} relation heads do not divide {heads} heads x {head_size} ="
            f" {heads * head_size}; choose a divisor of both hidden sizes"
        )
    return x.transpose(1, 2).reshape(batch, tokens, num_relation_heads, -1).transpose(1, 2)


def relation_weight(mask_or_shape: Tensor | tuple[int, int], reduction: str) -> Tensor:
    """What a sum is divided by: an exact int64 scalar, on the mask's device.

    mask_or_shape is the mask, or (rows, tokens) where no row has padding. "sequence": the sequences with a
    valid token; "token": the valid tokens. Across micro-batches and workers these are added up before
    dividing.
    """
    by_sequence = reduction.startswith("sequence")
    if isinstance(mask_or_shape, Tensor):
        return mask_or_shape.any(dim=-1).sum() if by_sequence else mask_or_shape.sum()
    rows, tokens = mask_or_shape
    return torch.tensor(rows if by_sequence else rows * tokens)


def _reference_rows(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    mask: Tensor | None,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> Tensor:
    """KL of every query, averaged over heads, zero at padded queries: [B, T]."""
    teacher_BHTS = _log_relation(teacher_x, teacher_y, teacher_bias, mask)
    student_BHTS = _log_relation(student_x, student_y, student_bias, mask)
    difference_BHTS = teacher_BHTS - student_BHTS
    if mask is not None:  # -inf minus -inf at padded keys
        difference_BHTS = difference_BHTS.masked_fill(~_visible_keys(mask), 0.0)
    rows_BT = (teacher_BHTS.exp() * difference_BHTS).sum(dim=-1).mean(dim=1)
    return rows_BT if mask is None else rows_BT.masked_fill(~mask, 0.0)


def _log_relation(x: Tensor, y: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is not None:  # nothing that stands at a padded position may leak, nor receive a gradient
        x, y = (side.masked_fill(~mask[:, None, :, None], 0.0) for side in (x, y))
    dtype = torch.promote_types(x.dtype, torch.float32)
    scores_BHTS = x.to(dtype) @ y.to(dtype).transpose(-1, -2) / math.sqrt(x.shape[-1])
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.to(dtype)
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~_visible_keys(mask), -math.inf)
    return scores_BHTS.log_softmax(dim=-1)


def _visible_keys(mask: Tensor) -> Tensor:
    """[B, 1, 1, S]. In a sequence without a valid token all keys are visible: its rows stay finite, and count
    zero."""
    return (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]


def reduce_rows(rows_BT: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """[B, T] -> scalar: per sequence first, then over sequences; padded rows hold zero. No host sync."""
    batch, tokens = rows_BT.shape
    total_B = rows_BT.sum(dim=-1)
    if reduction.startswith("sequence"):
        total_B = total_B / (tokens if mask is None else mask.sum(dim=-1).clamp(min=1))
    total = total_B.sum()
    if reduction.endswith("_sum"):
        return total
    if mask is None:
        return total / (batch if reduction == "sequence" else batch * tokens)
    return total / relation_weight(mask, reduction).clamp(min=1)


def _check(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    mask: Tensor | None,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> None:
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
