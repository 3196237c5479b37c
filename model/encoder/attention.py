"""Attention with dropout on a CPU, a bounded tile of scores at a time.

PyTorch's fast CPU attention has no dropout. Asked for it, PyTorch falls back to whole maps and draws one random number
at a time, which doubles the time of a 6 x 384 student's forward and backward and triples its memory. Here the
backward computes the tiles and draws the numbers again instead of keeping them. In all other cases (GPU, no dropout, a
learned bias) PyTorch's own attention runs.

In bfloat16, products, probabilities and gradients of scores are bfloat16, as PyTorch's own are under autocast; sums
within a product or a softmax, and over tiles, are float32.

Decisions to drop are those of kernels/dropout.py. Invariant: no whole map is ever in memory.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from minilm.model.encoder.taps import active_blocks
from minilm.model.encoder.tile_size import PADDED, TILE, tiles
from minilm.model.kernels.dropout import DTYPES, Decisions, draw_seed

_ROUND = 32


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [batch, heads, tokens, size] -> [batch, tokens, heads, size].

    Where documents lie end to end (taps.py), within each of them; attention_mask is then of the widest one alone.
    """
    blocks = active_blocks()
    if blocks is None:
        return _attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    sides = (blocks.split(side, 2) for side in (query, key, value))
    rounded = value.device.type == "cpu" and value.dtype == torch.bfloat16
    of_block = _attend_rounded if rounded else _attend
    outputs = [
        of_block(module, q, k, v, seen, dropout, scaling, **kwargs).flatten(0, 1)
        for q, k, v, seen in zip(*sides, blocks.squares(attention_mask), strict=True)
    ]
    together = torch.cat(outputs)
    return pad(together, (0, 0, 0, 0, 0, query.shape[2] - len(together)))[None], None


def _attend_rounded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """`_attend` with tokens filled up to a multiple of `_ROUND`, and row by row where there is dropout.

    For each shape of a product in bfloat16 a CPU's kernel is compiled, which takes a millisecond and half a megabyte:
    documents have too many lengths for that.
    """
    tokens = query.shape[-2]
    if short := -tokens % _ROUND:
        query, key, value = (pad(side, (0, 0, 0, short)) for side in (query, key, value))
        if seen is None:
            seen = (torch.arange(tokens + short) < tokens)[None, None, None]
        else:
            yes, no = (True, False) if seen.dtype == torch.bool else (0.0, torch.finfo(seen.dtype).min)
            seen = pad(pad(seen, (0, 0, 0, short), value=yes), (0, short), value=no)
    rows = len(query) if dropout else 1
    parts = zip(*(side.chunk(rows) for side in (query, key, value)), strict=True)
    outputs = [_attend(module, q, k, v, seen, dropout, scaling, **kwargs) for q, k, v in parts]
    return torch.cat(outputs)[:, :tokens]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    learned = attention_mask is not None and attention_mask.requires_grad
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):  # rotation gives float32 q and k
        query, key = query.to(value.dtype), key.to(value.dtype)
    plain = query.device.type == "cpu" and query.dtype in DTYPES
    if not dropout or not plain or learned or query.shape[-2] != key.shape[-2]:
        widened = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad
        if widened:  # PyTorch's backward in bfloat16 takes several times as long as in float32
            query, key, value = query.float(), key.float(), value.float()
            if attention_mask is not None and attention_mask.dtype != torch.bool:
                attention_mask = attention_mask.float()
        with torch.autocast(query.device.type, enabled=False) if widened else nullcontext():
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return output.bfloat16() if widened else output
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = dropout_attention(
        query * scaling, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, dropout
    )
    return output.transpose(1, 2).contiguous()


@torch.compiler.disable  # loops over tiles and makes a generator: nothing to gain for a compiler
def dropout_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """dropout(softmax(q kᵀ + mask)) v for q, k, v [batch, heads, tokens, size]; q is scaled already.

    mask: bool (True where a key is seen) or added to the scores; broadcasts to [batch, heads, tokens, tokens].
    """
    output: Tensor = _DropoutAttention.apply(q, k, v, mask, dropout, draw_seed())
    return output


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, seed: int
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, PADDED)
            mask = mask.to(q.dtype)[(None,) * (4 - mask.dim())].expand(*q.shape[:3], k.shape[2])
        ctx.dropout, ctx.seed = dropout, seed
        output = torch.empty_like(q)
        drop = Decisions(dropout, seed, q.dtype)
        for tile in tiles(q.shape, TILE["cpu"] * 4 // q.element_size()):
            p = _probabilities(q, k, mask, tile)
            torch.matmul(drop.apply_(p, drop.draw(p.shape)), v[tile[:2]], out=output[tile])
        ctx.save_for_backward(q, k, v, mask)
        return output.div_(drop.rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        drop = Decisions(ctx.dropout, ctx.seed, q.dtype)
        upstream = upstream / drop.rate
        limit = TILE["cpu"] * 4 // q.element_size()
        wide = torch.promote_types(q.dtype, torch.float32)  # tiles of one head add up in it
        dtype = q.dtype if q.shape[2] * k.shape[2] <= limit else wide
        grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.empty_like(x, dtype=dtype) for x in (k, v))
        for tile in tiles(q.shape, limit):
            heads, is_first = tile[:2], tile[2].start == 0
            p = _probabilities(q, k, mask, tile)
            kept = drop.draw(p.shape)
            grad_p = drop.apply_(upstream[tile] @ v[heads].transpose(-1, -2), kept)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            torch.matmul(grad_scores, k[heads], out=grad_q[tile])
            _add(grad_k[heads], grad_scores.transpose(-1, -2), q[tile], is_first)
            _add(grad_v[heads], drop.apply_(p, kept).transpose(-1, -2), upstream[tile], is_first)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _add(total: Tensor, x: Tensor, y: Tensor, is_first: bool) -> None:
    """total = x y for the first tile of a head, and total += x y for the others."""
    if is_first and total.dtype == x.dtype:
        torch.matmul(x, y, out=total)
    elif is_first:
        total.copy_(x @ y)
    else:
        total += x @ y


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, tile: tuple[slice, slice, slice]) -> Tensor:
    scores = q[tile] @ k[tile[:2]].transpose(-1, -2)
    if mask is not None:
        scores += mask[tile]
    return scores.softmax(dim=-1)
