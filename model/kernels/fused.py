"""The Triton kernels as one differentiable function.

Kept between forward and backward: the inputs and two float32 numbers a query. Leaves out: second derivatives, a
learned bias on the student's side (its gradient would be a whole map), dtypes other than float32 and bfloat16.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilm.model.kernels.relation import relation_backward, relation_forward

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """How a kernel is launched: queries a block and keys a block (in the backward, the block that a program owns and
    those that it loops over), warps a program, stages of the pipelined loop."""

    M: int
    N: int
    num_warps: int
    num_stages: int


# The one table to tune; `python -m minilm.orchestrator.bench.tune_kernels` measures candidates. At head size 128
# the backward takes 65 KB of shared memory in bfloat16, 100 KB in float32.
LAUNCH = {
    ("forward", torch.bfloat16): Launch(64, 64, 4, 3),
    ("backward", torch.bfloat16): Launch(64, 64, 4, 3),
    ("forward", torch.float32): Launch(32, 32, 4, 3),
    ("backward", torch.float32): Launch(32, 32, 4, 3),
}
if _INTERPRETED:  # Python runs every program, so fewer and larger ones are faster
    LAUNCH |= {key: Launch(128, 128, 4, 3) for key in LAUNCH if key[1] == torch.float32}


def fused_sum(
    teacher_x: Tensor,
    teacher_y: Tensor,
    student_x: Tensor,
    student_y: Tensor,
    keys: Tensor | None,
    weights_BT: Tensor,
    teacher_bias: Tensor | None,
    student_bias: Tensor | None,
) -> Tensor:
    """Σ weights[b, t] · KL[b, h, t], a float32 scalar, gradients to the student. Arguments as in `tiled_sum`."""
    total: Tensor = _Fused.apply(
        student_x, student_y, teacher_x, teacher_y, keys, weights_BT, teacher_bias, student_bias
    )
    return total


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_x: Tensor,
        student_y: Tensor,
        teacher_x: Tensor,
        teacher_y: Tensor,
        keys: Tensor | None,
        weights_BT: Tensor,
        teacher_bias: Tensor | None,
        student_bias: Tensor | None,
    ) -> Tensor:
        batch, heads, tokens, _ = student_x.shape
        sides = [side.contiguous() for side in (teacher_x, teacher_y, student_x, student_y)]
        keys = None if keys is None else keys.to(torch.uint8).contiguous()
        bias_T, strides_T = _bias(teacher_bias, tokens, weights_BT)
        bias_S, strides_S = _bias(student_bias, tokens, weights_BT)
        lse_T, lse_S, kl = weights_BT.new_empty((3, batch, heads, tokens))
        weights_BT = weights_BT.contiguous()
        ctx.constants = _constants(teacher_x, student_x, keys, teacher_bias, student_bias)
        ctx.strides = (*strides_T, *strides_S)
        ctx.save_for_backward(*sides, keys, bias_T, bias_S, lse_T, lse_S, weights_BT)
        launch = LAUNCH["forward", student_x.dtype]
        grid = (triton.cdiv(tokens, launch.M), batch * heads)
        keys_or_any = weights_BT if keys is None else keys
        relation_forward[grid](
            *sides,
            keys_or_any,
            bias_T,
            bias_S,
            *ctx.strides,
            lse_T,
            lse_S,
            kl,
            heads,
            tokens,
            **ctx.constants,
            **launch._asdict(),
        )
        return (kl * weights_BT[:, None, :]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *sides, keys, bias_T, bias_S, lse_T, lse_S, weights_BT = ctx.saved_tensors
        batch, heads, tokens, _ = sides[2].shape
        weights_BT = weights_BT * upstream  # on the device: no host sync
        grad_x, grad_y = torch.empty_like(sides[2]), torch.empty_like(sides[3])
        launch = LAUNCH["backward", grad_x.dtype]
        grid = (triton.cdiv(tokens, launch.M), batch * heads, 2)
        keys_or_any = weights_BT if keys is None else keys
        relation_backward[grid](
            *sides, keys_or_any, bias_T, bias_S, *ctx.strides, lse_T, lse_S, weights_BT, grad_x, grad_y,
            heads, tokens, **ctx.constants, **launch._asdict(),
        )  # fmt: skip
        return grad_x, grad_y, None, None, None, None, None, None


def _constants(teacher: Tensor, student: Tensor, *optional: Tensor | None) -> dict[str, Any]:
    size_T, size_S = teacher.shape[-1], student.shape[-1]
    flags = zip(("HAS_KEYS", "HAS_BIAS_T", "HAS_BIAS_S"), optional, strict=True)
    return {
        "SIZE_T": size_T,
        "SIZE_S": size_S,
        "D_T": max(16, triton.next_power_of_2(size_T)),
        "D_S": max(16, triton.next_power_of_2(size_S)),
        **{flag: tensor is not None for flag, tensor in flags},
        "WIDEN": student.dtype == torch.bfloat16 and _INTERPRETED,
    }


def _bias(bias: Tensor | None, tokens: int, unused: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The bias as whole, contiguous maps, and its strides over batch and heads: 0 where a map is shared."""
    if bias is None:
        return unused, (0, 0)
    bias = bias[(None,) * (4 - bias.dim())]
    batch, heads = bias.shape[:2]
    maps = bias.expand(batch, heads, tokens, tokens).contiguous()
    return maps, (maps.stride(0) if batch > 1 else 0, maps.stride(1) if heads > 1 else 0)
