"""How maps of scores are divided into tiles that fit in fast memory."""

from collections.abc import Iterator

import torch

TILE = {"cpu": 1 << 19, "cuda": 1 << 26}  # scores: 2 MB of float32 stay in a CPU's cache; 256 MB fill a GPU
PADDED = -1e30  # not -inf: the difference of two padded scores must be 0, not NaN


def tiles(shape: torch.Size, tile: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices that cover [B, H, T], of at most `tile` scores each: whole sequences, whole heads, or rows of one head."""
    batch, heads, tokens, _ = shape
    b_step = max(1, tile // (heads * tokens * tokens))
    h_step = heads if heads * tokens * tokens <= tile else max(1, tile // (tokens * tokens))
    t_step = tokens if tokens * tokens <= tile else max(1, tile // tokens)
    for b in range(0, batch, b_step):
        for h in range(0, heads, h_step):
            for t in range(0, tokens, t_step):
                yield slice(b, b + b_step), slice(h, h + h_step), slice(t, t + t_step)
