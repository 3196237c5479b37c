"""Attention with dropout on a CPU, a bounded tile of scores at a time.

PyTorch's fast CPU attention has no dropout. Asked for it, PyTorch falls back to whole maps and draws one random number
at a time, which doubles the time of a 6 x 384 student's forward and backward and triples its memory. Here the
backward draws the same numbers again instead of keeping them. In all other cases (GPU, no dropout, bfloat16, a learned
bias) PyTorch's own attention runs.

The dropout rate is rounded to a multiple of 1/65536. Invariants: the numbers drawn depend on one draw from PyTorch's
global CPU generator alone; no whole map is ever in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from minilm.model.encoder.tile_size import PADDED, TILE, tiles


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
    """transformers' attention function: [batch, heads, tokens, size] -> [batch, tokens, heads, size]."""
    learned = attention_mask is not None and attention_mask.requires_grad
    plain = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    plain = plain and query.dtype == key.dtype == value.dtype  # under autocast rotation gives float32 q and k
    if not dropout or not plain or learned or query.shape[-2] != key.shape[-2]:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = dropout_attention(
        query * scaling, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, dropout
    )
    return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # loops over tiles and makes a generator: nothing to gain for a compiler
def dropout_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """dropout(softmax(q kᵀ + mask)) v for q, k, v [batch, heads, tokens, size]; q is scaled already.

    mask: bool (True where a key is seen) or added to the scores; broadcasts to [batch, heads, tokens, tokens].
    """
    seed = int(torch.randint(1 << 62, ()))  # a CPU tensor: no device waits
    output: Tensor = _DropoutAttention.apply(q, k, v, mask, dropout, seed)
    return output


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, seed: int
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())].expand(*q.shape[:3], k.shape[2])
        ctx.dropout, ctx.seed = dropout, seed
        log_sums = torch.empty(q.shape[:3], dtype=q.dtype)
        output = torch.empty_like(q)
        keep = _Keep(dropout, seed)
        for tile in tiles(q.shape, TILE["cpu"]):
            b, h, _ = tile
            p = _scores(q, k, mask, tile)
            top = p.amax(dim=-1, keepdim=True)
            sums = p.sub_(top).exp_().sum(dim=-1, keepdim=True)
            p.mul_(keep(p.shape)).div_(sums.mul(keep.rate))
            torch.matmul(p, v[b, h], out=output[tile])
            log_sums[tile] = sums.log_().add_(top).squeeze(-1)
        ctx.save_for_backward(q, k, v, mask, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, output, log_sums = ctx.saved_tensors
        upstream = upstream.contiguous()
        along = (upstream * output).sum(dim=-1, keepdim=True)  # Σ_j p(j) ∂p(j) of every row
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        keep = _Keep(ctx.dropout, ctx.seed)
        for tile in tiles(q.shape, TILE["cpu"]):
            b, h, _ = tile
            p = _scores(q, k, mask, tile).sub_(log_sums[tile][..., None]).exp_()
            kept = keep(p.shape)
            scores = (upstream[tile] @ v[b, h].transpose(-1, -2)).mul_(kept).div_(keep.rate)
            scores.sub_(along[tile]).mul_(p)
            torch.matmul(scores, k[b, h], out=grad_q[tile])
            grad_k[b, h] += scores.transpose(-1, -2) @ q[tile]
            grad_v[b, h] += p.mul_(kept).div_(keep.rate).transpose(-1, -2) @ upstream[tile]
        return grad_q, grad_k, grad_v, None, None, None


class _Keep:
    """The same stream of keep-or-drop decisions from one seed; `rate` is the fraction that is kept."""

    def __init__(self, dropout: float, seed: int) -> None:
        self._threshold = round(dropout * 65536)
        self.rate = 1 - self._threshold / 65536
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: torch.Size) -> Tensor:
        """bool of this shape: True with probability `rate`. 16 random bits a decision: four from one draw."""
        count = shape.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64)
        bits.random_(
            -(1 << 63), None, generator=self._generator
        )  # without a range the highest bit is never set
        decisions = bits.view(torch.int16)[:count] >= self._threshold - 32768
        return decisions.view(shape)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, tile: tuple[slice, slice, slice]) -> Tensor:
    scores = q[tile] @ k[tile[:2]].transpose(-1, -2)
    if mask is None:
        return scores
    part = mask[tile]
    return scores.masked_fill_(~part, PADDED) if part.dtype == torch.bool else scores.add_(part)
