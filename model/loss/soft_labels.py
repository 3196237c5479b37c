"""Soft-label distillation of a masked language model: the baseline that MiniLM is compared with (table 3).

Some tokens of every row are replaced by the mask token, the same for teacher and student; at these the
student's prediction is pulled to the teacher's, KL over the vocabulary at temperature 1.

Which tokens are masked is a function of the row's token ids alone (static masking, as BERT's): it does not
depend on who computes the row, on its place in a batch, on its padding or on a random state. Leaves out: keeping
or swapping a part of the chosen tokens. Invariant: no host sync; logits are computed at the chosen positions only.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

PERCENT = 15  # of a row's tokens, as in BERT


class Masked(NamedTuple):
    """ids [batch, tokens] with mask tokens; positions int64 [batch, k] of these; valid bool [batch, k]."""

    ids: Tensor
    positions: Tensor
    valid: Tensor


def mask_tokens(ids: Tensor, mask: Tensor | None, mask_token_id: int, special_ids: tuple[int, ...]) -> Masked:
    """Choose `PERCENT` of each row's valid tokens (at least one), never special ones, and mask them.

    k is what a row without padding has; `valid` is False at the rest of a shorter row, and of one with too few
    tokens to choose from.
    """
    own = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    eligible = own.clone()
    for special in special_ids:
        eligible &= ids != special
    scores = _hash(ids.masked_fill(~own, -1)).masked_fill(~eligible, -1)
    positions = scores.topk(_num_chosen(ids.shape[1]), dim=-1).indices  # best first
    places = torch.arange(positions.shape[1], device=ids.device)
    valid = eligible.gather(1, positions) & (places < _num_chosen(own.sum(dim=-1, keepdim=True)))
    chosen = torch.where(valid, mask_token_id, ids.gather(1, positions))
    return Masked(ids.scatter(1, positions, chosen), positions, valid)


def _num_chosen(num_tokens: Any) -> Any:
    """Of so many valid tokens (an int, or an integer tensor): at least one, halves rounded up."""
    chosen = (num_tokens * PERCENT + 50) // 100
    return chosen.clamp(min=1) if isinstance(chosen, Tensor) else max(1, chosen)


def soft_label_rows(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary: [batch, k, vocabulary] -> [batch, k], float32 or better."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher, student = (
        logits.to(dtype).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits)
    )
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def _hash(ids: Tensor) -> Tensor:
    """A non-negative int64 per token, mixed from the row's ids (-1 adds nothing) and the position; multiplications
    wrap around."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    row = ((ids + 1) * (places * 0x5851F42D4C957F2D)).sum(dim=-1, keepdim=True)
    mixed = row + places * 0x2545F4914F6CDD1D
    for factor in (0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35):
        mixed = (mixed ^ (mixed >> 31)) * factor
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF
