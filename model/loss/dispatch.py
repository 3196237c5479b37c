"""The choice of the divergence's implementation: by name, or the fastest that applies.

A fallback is logged once, with its reason. Triton is imported only where it is used: it is not installed everywhere,
and takes a second.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from minilm.model.errors import ModelError
from minilm.model.loss.reference import reference_sum
from minilm.model.loss.tiled import tiled_sum

IMPLEMENTATIONS = ("reference", "tiled", "triton")

_log = logging.getLogger(__name__)


def choose(
    implementation: str, teacher_x: Tensor, student_x: Tensor, student_bias: Tensor | None
) -> Callable[..., Tensor]:
    """The function for "reference", "tiled", "triton" or "auto": Triton on a GPU where it applies, else tiles.

    ModelError for another name, or when Triton is asked for and does not apply.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ModelError(f"implementation {implementation!r} is not known; use one of {known}")
    if implementation == "reference":
        return reference_sum
    if implementation == "tiled" or (implementation == "auto" and not student_x.is_cuda):
        return tiled_sum
    why_not = _why_not_triton(teacher_x, student_x, student_bias)
    if why_not is None:
        from minilm.model.kernels.fused import fused_sum

        return fused_sum
    if implementation == "triton":
        raise ModelError(f"the triton implementation does not apply: {why_not}; use tiled or auto")
    _warn_once(why_not)
    return tiled_sum


def _why_not_triton(teacher_x: Tensor, student_x: Tensor, student_bias: Tensor | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not student_x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU, or TRITON_INTERPRET=1"
    if student_x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {student_x.dtype}"
    largest = max(teacher_x.shape[-1], student_x.shape[-1])
    if largest > 128:
        return f"it takes head sizes up to 128, not {largest}"
    if student_bias is not None and student_bias.requires_grad:
        return "it gives no gradient to a student's learned position bias"
    return None


@functools.cache
def _warn_once(why_not: str) -> None:
    _log.warning("relation_kl falls back from triton to tiled: %s", why_not)
