"""The divergence in readable PyTorch, on whole maps: the reference that faster implementations are tested against.

Invariant: exact in any dtype (computed in float32 or better), differentiable twice, no trick.
Suffixes as in relations.py: B sequences, H heads, T tokens (queries), S tokens (keys).
"""

import math

import torch
from torch import Tensor


def reference_sum(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    keys: Tensor | None,
    weights_BT: Tensor,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> Tensor:
    """Σ weights[b, t] · KL[b, h, t], a scalar, float32 or better.

    keys: bool [batch, tokens], the visible keys of each sequence (at least one), or None for all of them.
    """
    teacher_BHTS = log_relation(teacher_x, teacher_y, teacher_bias, keys)
    student_BHTS = log_relation(student_x, student_y, student_bias, keys)
    difference_BHTS = teacher_BHTS - student_BHTS
    if keys is not None:  # -inf minus -inf at padded keys
        difference_BHTS = difference_BHTS.masked_fill(~keys[:, None, None, :], 0.0)
    kl_BHT = (teacher_BHTS.exp() * difference_BHTS).sum(dim=-1)
    return (kl_BHT * weights_BT[:, None, :]).sum()


def log_relation(x: Tensor, y: Tensor, bias: Tensor | None, keys: Tensor | None) -> Tensor:
    """log softmax(x yᵀ / √d + bias) over the visible keys: [B, H, T, S]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    scores_BHTS = x.to(dtype) @ y.to(dtype).transpose(-1, -2) / math.sqrt(x.shape[-1])
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.to(dtype)
    if keys is not None:
        scores_BHTS = scores_BHTS.masked_fill(~keys[:, None, None, :], -math.inf)
    return scores_BHTS.log_softmax(dim=-1)
