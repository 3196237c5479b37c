"""The divergence without whole maps: a bounded tile of scores at a time, on any device and dtype.

The forward computes the gradients too. The weight of every query in the loss is known beforehand, so each tile yields
both its part of the loss and its part of the student's gradient ∂KL/∂score = p_S - p_T; the backward only multiplies
by the upstream scalar. That takes four matrix products and two exponentials a score, where recomputing tiles in the
backward takes six and four. Kept for the backward: the gradients, O(batch · tokens · hidden).

Inputs in bfloat16 on a CPU that computes in it: products multiply bfloat16 numbers, which is exact, and add up in
float32. Scores, softmax and gradients of scores are float32; the latter are rounded as factors of the gradients.

Leaves out: second derivatives. Invariant: at most four tiles, of `TILE` scores (or one row) each, are in memory at a
time; no host sync.

Suffixes as in relations.py: B sequences, H heads, T tokens (queries), S tokens (keys), D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilm.model.encoder.tile_size import PADDED, TILE, tiles


def tiled_sum(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    keys: Tensor | None,
    weights_BT: Tensor,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> Tensor:
    """Σ weights[b, t] · KL[b, h, t], a scalar of the inputs' dtype (float32 or float64), gradients to the
    student.

    keys: bool [batch, tokens], the visible keys, or None for all. Biases broadcast to [batch, heads, tokens,
    tokens].
    """
    dtype = weights_BT.dtype
    s_bias = None if student_bias is None else student_bias.to(dtype)
    t_bias = None if teacher_bias is None else _expand(teacher_bias.to(dtype), teacher_x)
    sides = student_x, student_y, teacher_x, teacher_y
    with _products_of_bfloat16(all(side.dtype == torch.bfloat16 for side in sides)):
        total: Tensor = _Tiled.apply(*sides, s_bias, t_bias, keys, weights_BT)
    return total


@contextmanager
def _products_of_bfloat16(enabled: bool) -> Iterator[None]:
    """Let float32 products on this CPU round their factors to bfloat16; one setting for the whole process."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_x: Tensor,
        student_y: Tensor,
        teacher_x: Tensor,
        teacher_y: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        keys: Tensor | None,
        weights_BT: Tensor,
    ) -> Tensor:
        wants_x, wants_y, *_, wants_bias, _, _, _ = ctx.needs_input_grad
        dtype = weights_BT.dtype
        bias = _expand(student_bias, student_x)
        padding_B11S = None
        if keys is not None:
            padding_B11S = torch.zeros_like(weights_BT).masked_fill_(~keys, PADDED)[:, None, None, :]
        grad_x = weights_BT.new_empty(student_x.shape) if wants_x else None
        grad_y = weights_BT.new_zeros(student_y.shape) if wants_y else None
        grad_bias = torch.zeros_like(student_bias) if wants_bias and student_bias is not None else None
        total = weights_BT.new_zeros(())
        for b, h, t in tiles(student_x.shape, TILE["cpu" if student_x.device.type == "cpu" else "cuda"]):
            padding = None if padding_B11S is None else padding_B11S[b]
            t_x, s_x = (x[b, h, t].contiguous().to(dtype) for x in (teacher_x, student_x))
            t_y, s_y = (y[b, h].contiguous().to(dtype) for y in (teacher_y, student_y))
            p_T, s_T, z_T = _softmax(t_x, t_y, _tile_of(teacher_bias, b, h, t), padding)
            p_S, s_S, z_S = _softmax(s_x, s_y, _tile_of(bias, b, h, t), padding)
            weights = weights_BT[b, None, t]
            rows = (s_T.sub_(s_S).mul_(p_T)).sum(dim=-1) - z_T + z_S
            total += (rows * weights).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad = p_S.sub_(p_T).mul_(weights[..., None])
            if grad_x is not None:
                torch.matmul(grad, s_y, out=grad_x[b, h, t])
            if grad_y is not None:
                grad_y[b, h] += grad.transpose(-1, -2) @ s_x
            if grad_bias is not None:
                target = _tile_of(_four_dims(grad_bias), b, h, t)
                target += grad.sum_to_size(target.shape)
        for gradient in (grad_x, grad_y):
            if gradient is not None:
                gradient *= student_x.shape[-1] ** -0.5
        ctx.gradients = grad_x, grad_y, grad_bias
        ctx.dtypes = student_x.dtype, student_y.dtype, dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        x, y, bias = (None if grad is None else (grad * upstream).to(dtype) for grad, dtype in pairs)
        return x, y, None, None, bias, None, None, None


def _softmax(
    x: Tensor, y: Tensor, bias: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x yᵀ / √d: probabilities, scores less their row's maximum, and the log of the row's sum of exponentials."""
    scores = x.new_empty(*x.shape[:3], y.shape[2])
    flat, maps = scores.flatten(0, 1), (x.flatten(0, 1), y.flatten(0, 1).transpose(-1, -2))
    torch.baddbmm(flat, *maps, beta=0, alpha=x.shape[-1] ** -0.5, out=flat)
    if bias is not None:
        scores += bias
    if padding is not None:
        scores += padding
    scores -= scores.amax(dim=-1, keepdim=True)
    p = scores.exp()
    sums = p.sum(dim=-1, keepdim=True)
    p /= sums
    return p, scores, sums.log_().squeeze(-1)


def _four_dims(bias: Tensor) -> Tensor:
    """A view with leading dimensions of size 1, four in all."""
    return bias[(None,) * (4 - bias.dim())]


def _expand(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else _four_dims(bias).expand(*x.shape[:3], x.shape[2])


def _tile_of(bias: Tensor | None, b: slice, h: slice, t: slice) -> Any:
    """The bias of one tile; dimensions of size 1 are kept whole."""
    if bias is None:
        return None
    whole = slice(None)
    return bias[
        tuple(index if size > 1 else whole for index, size in zip((b, h, t), bias.shape[:3], strict=True))
    ]
