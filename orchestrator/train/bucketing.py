"""Rows of unequal length → what is computed at a time, with little padding or none.

On a CPU, rows of each length are a group, and all groups lie end to end in one sequence (`end_to_end`): no padding is
computed, and a group costs calls of attention and of the terms alone. Else, and where rows have padding in front or an
objective masks tokens of rows, a few groups (`by_length`), each cut to its longest row.

The groups are a pure function of one micro-batch's mask, so it does not matter who computes it. Columns are cut at the
end only, and only where every row of the group has padding: positions keep their numbers, and rows with padding in
front stay as they are. The mask is read on the CPU, before anything goes to a device: no host sync.

Leaves out: groups over several micro-batches, the unit of determinism.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilm.model.encoder.taps import Block, Blocks

ROUND = 32  # widths are multiples of it: matrix units like them, and there are few shapes
LEAST_GAIN = 0.1  # share of a micro-batch's tokens, padding included, that one more group must save


def by_length(ids: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Groups of (ids, mask) that hold every row of ids [rows, tokens] once, in their order, the widest group first.

    mask: bool [rows, tokens] on the CPU, None where no row has padding. A group's mask is None where it has none.
    """
    if mask is None:
        return [(ids, None)]
    tokens = ids.shape[1]
    ends = _ends(mask)
    widths = (ends + ROUND - 1).div(ROUND, rounding_mode="floor").clamp(min=1).mul(ROUND).clamp(max=tokens)
    sizes, counts = widths.unique(return_counts=True)
    groups = []
    narrower = 0
    for width in group_widths(sizes.tolist(), counts.tolist(), LEAST_GAIN * mask.numel()):
        rows = ((widths > narrower) & (widths <= width)).nonzero().squeeze(1)
        group_mask = mask[rows, :width]
        groups.append((ids[rows, :width], None if group_mask.all() else group_mask))
        narrower = width
    return groups[::-1]


def end_to_end(ids: Tensor, mask: Tensor, *, few_lengths: bool = False) -> tuple[Tensor, Blocks] | None:
    """The valid tokens of all rows as one sequence [1, tokens], rows of a length side by side, the longest first; and
    how the rows lie in it. None where a row's valid tokens are not its first ones, or none is valid.

    few_lengths: the sequence is filled up, by a sixteenth at most: for products in bfloat16 a CPU's kernel is compiled
    for each number of tokens, which takes 10 ms and 2 MB.
    """
    lengths = _ends(mask)
    if not torch.equal(lengths, mask.sum(dim=1)) or not mask.any():
        return None
    by_width = [
        (width, ids[lengths == width, :width]) for width in lengths.unique().flip(0).tolist() if width
    ]
    blocks = Blocks(Block(len(rows), width) for width, rows in by_width)
    sequence = torch.cat([rows.flatten() for _, rows in by_width])
    short = -len(sequence) % (1 << max(0, len(sequence).bit_length() - 5)) if few_lengths else 0
    return pad(sequence, (0, short))[None], blocks


def _ends(mask: Tensor) -> Tensor:
    """int64 [rows]: one after the last valid token; 0 without any."""
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)


def group_widths(sizes: list[int], counts: list[int], group_cost: float) -> list[int]:
    """The widths of the groups, ascending, for `counts[i]` rows of width `sizes[i]` (ascending).

    They minimise the tokens computed, rows times width, plus `group_cost` tokens for each group.
    """
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # for the first i sizes
    for end in range(1, len(sizes) + 1):
        best.append(
            min(
                (cost + sum(counts[start:end]) * sizes[end - 1] + group_cost, [*chosen, sizes[end - 1]])
                for start, (cost, chosen) in enumerate(best)
            )
        )
    return best[-1][1]
