"""Soft-label distillation of a masked language model: the baseline that MiniLM is compared with (table 3).

Some tokens of every row are replaced by the mask token, the same for teacher and student; at these the
student's prediction is pulled to the teacher's, KL over the vocabulary at temperature 1.

Which tokens are masked is a function of the row's token ids alone (static masking, as BERT's): it does not
depend on who computes the row, on its place in a batch or on a random state. Leaves out: keeping or swapping
a part of the chosen tokens. Invariant: no host sync; logits are computed at the chosen positions only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHARE = 0.15  # of a row's tokens, as in BERT


class Masked(NamedTuple):
    """ids [batch, tokens] with mask tokens; positions int64 [batch, k] of these; valid bool [batch, k]."""

    ids: Tensor
    positions: Tensor
    valid: Tensor


def mask_tokens(ids: Tensor, mask: Tensor | None, mask_token_id: int, special_ids: tuple[int, ...]) -> Masked:
    """Choose `SHARE` of each row's tokens (at least one), never padding or special ones, and mask them.

    A row with fewer tokens to choose from than k has `valid` False at the rest.
    """
    eligible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.clone()
    for special in special_ids:
        eligible &= ids != special
    num_chosen = max(1, round(SHARE * ids.shape[1]))
    scores = _hash(ids).masked_fill(~eligible, -1)
    positions = scores.topk(num_chosen, dim=-1).indices
    valid = eligible.gather(1, positions)
    chosen = torch.where(valid, mask_token_id, ids.gather(1, positions))
    return Masked(ids.scatter(1, positions, chosen), positions, valid)


def soft_label_rows(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary: [batch, k, vocabulary] -> [batch, k], float32 or better."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher, student = (
        logits.to(dtype).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits)
    )
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def _hash(ids: Tensor) -> Tensor:
    """A non-negative int64 per token, mixed from the row's ids and the position; multiplications wrap
    around."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    row = ((ids + 1) * (places * 0x5851F42D4C957F2D)).sum(dim=-1, keepdim=True)
    mixed = row + places * 0x2545F4914F6CDD1D
    for factor in (0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35):
        mixed = (mixed ^ (mixed >> 31)) * factor
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF
