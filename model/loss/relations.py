"""The divergence between a teacher's and a student's self-attention relations.

    relation(x, y) = softmax(x yᵀ / √d + bias)         over the valid keys of one sequence
    divergence     = KL(teacher's relation ‖ student's), summed over queries, averaged over heads

Source: MiniLM (arXiv 2002.10957) eq. 6-10; with x = y for MiniLMv2 (arXiv 2012.15828) and for value
relations.

Legend of the shape suffixes: B sequences, H heads, T tokens (queries), S tokens (keys), D head size (each
side its own).

Invariants: the softmax is taken in float32 or better whatever the inputs and the autocast state; padded keys
have probability zero on both sides; padded queries and sequences without a valid token contribute neither
value nor gradient, so the contents of padded positions (NaN included) change nothing; only the student
receives gradients.
"""

import torch
from torch import Tensor

from minilm.model.errors import ModelError
from minilm.model.loss.dispatch import choose
from minilm.model.loss.reference import log_relation
from minilm.model.loss.validate import check_relations

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
    implementation: "reference" (whole maps), "tiled" (bounded memory, CPU and GPU), "triton" (fused), or "auto"
        for the fastest that applies.

    Raises ModelError when shapes, dtypes, reduction or implementation do not fit.
    """
    check_relations(teacher_x, teacher_y, student_x, student_y, mask, teacher_bias, student_bias)
    if reduction not in REDUCTIONS:
        raise ModelError(f"reduction {reduction!r} is not known; use one of {', '.join(REDUCTIONS)}")
    compute = choose(implementation, teacher_x, student_x, student_bias)
    inputs = [teacher_x.detach(), teacher_y.detach(), student_x, student_y]
    if (
        mask is not None
    ):  # a padded position must neither leak its contents, NaN included, nor receive a gradient
        inputs = [side.masked_fill(~mask[:, None, :, None], 0.0) for side in inputs]
    with torch.autocast(student_x.device.type, enabled=False):
        keys = None if mask is None else _visible_keys(mask)
        weights_BT = query_weights(mask, student_x.shape, reduction, student_x) / student_x.shape[1]
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
        total = compute(*inputs, keys, weights_BT, teacher_bias, student_bias)
        return total if reduction.endswith("_sum") else divide(total, mask, student_x.shape, reduction)


def relation_maps(x: Tensor, y: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The relation itself, to be shown: probabilities [batch, heads, tokens, tokens], rows over valid keys.

    Rows of padded queries are zero. Arguments as in `relation_kl`.
    """
    with torch.autocast(x.device.type, enabled=False):
        if mask is None:
            return log_relation(x, y, bias, None).exp()
        maps_BHTS = log_relation(x, y, bias, _visible_keys(mask)).exp()
        return maps_BHTS.masked_fill(~mask[:, None, :, None], 0.0)


def relation_heads(x: Tensor, num_relation_heads: int) -> Tensor:
    """Concatenate the heads and split again: [batch, heads, tokens, d] -> [batch, R, tokens, heads·d/R].

    MiniLMv2 (arXiv 2012.15828, section 3.1): it makes sides with different head counts comparable.
    """
    batch, heads, tokens, head_size = x.shape
    if num_relation_heads < 1 or heads * head_size % num_relation_heads:
        raise ModelError(
            f"{num_relation_heads} relation heads do not divide {heads} heads x {head_size} ="
            f" {heads * head_size}; choose a divisor of both hidden sizes"
        )
    return x.transpose(1, 2).reshape(batch, tokens, num_relation_heads, -1).transpose(1, 2)


def relation_weight(mask_or_shape: Tensor | tuple[int, int], reduction: str) -> Tensor:
    """The number that a sum is divided by: an exact int64 scalar, on the mask's device.

    mask_or_shape: the mask, or (rows, tokens) where no row has padding. "sequence" counts the sequences with a valid
    token, "token" the valid tokens. Counts of micro-batches and workers are added up before dividing.
    """
    by_sequence = reduction.startswith("sequence")
    if isinstance(mask_or_shape, Tensor):
        return mask_or_shape.any(dim=-1).sum() if by_sequence else mask_or_shape.sum()
    rows, tokens = mask_or_shape
    return torch.tensor(rows if by_sequence else rows * tokens)


def query_weights(mask: Tensor | None, shape: torch.Size, reduction: str, like: Tensor) -> Tensor:
    """The weight of each query before the last division: [B, T], zero at padding, float32 or better.

    shape: its first dimension is the batch, its last but one the tokens. No host sync.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    by_sequence = reduction.startswith("sequence")
    if mask is None:
        weight = 1 / shape[-2] if by_sequence else 1.0
        return torch.full((shape[0], shape[-2]), weight, dtype=dtype, device=like.device)
    valid_BT = mask.to(dtype)
    return valid_BT / valid_BT.sum(dim=-1, keepdim=True).clamp(min=1) if by_sequence else valid_BT


def divide(total: Tensor, mask: Tensor | None, shape: torch.Size, reduction: str) -> Tensor:
    """The last division, by the number of valid sequences or tokens; zero where there is none. No host sync."""
    if mask is None:
        return total / (shape[0] if reduction == "sequence" else shape[0] * shape[-2])
    return total / relation_weight(mask, reduction).clamp(min=1)


def _visible_keys(mask: Tensor) -> Tensor:
    """[B, S]. A sequence without a valid token sees all its keys, so its rows stay finite; their weight is zero."""
    return mask | ~mask.any(dim=-1, keepdim=True)
