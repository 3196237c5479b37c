"""Which tokens are masked for soft labels: the same for teacher and student.

A function of the row's token ids alone (static masking, as BERT's): it does not depend on who computes the row, on
its place in a batch, on its padding or on a random state. Leaves out: keeping or swapping a part of the chosen
tokens. Invariant: no host sync.
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
    ranks = torch.arange(positions.shape[1], device=ids.device)
    valid = eligible.gather(1, positions) & (ranks < _num_chosen(own.sum(dim=-1, keepdim=True)))
    chosen = torch.where(valid, mask_token_id, ids.gather(1, positions))
    return Masked(ids.scatter(1, positions, chosen), positions, valid)


def _num_chosen(num_tokens: Any) -> Any:
    """How many of a row's valid tokens (an int, or an integer tensor) are masked: at least one, halves rounded up."""
    chosen = (num_tokens * PERCENT + 50) // 100
    return chosen.clamp(min=1) if isinstance(chosen, Tensor) else max(1, chosen)


def _hash(ids: Tensor) -> Tensor:
    """A non-negative int64 per token, mixed from the row's ids (-1 adds nothing) and the position; multiplications
    wrap around."""
    positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    row = ((ids + 1) * (positions * 0x5851F42D4C957F2D)).sum(dim=-1, keepdim=True)
    mixed = row + positions * 0x2545F4914F6CDD1D
    for factor in (0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35):
        mixed = (mixed ^ (mixed >> 31)) * factor
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF
