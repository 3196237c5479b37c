"""What a stage keeps to from its first attempt on, because another choice would change the bits, or worse.

The main rank chooses, from the checkpoint if there is one, and all ranks do as it says.
"""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
PRECISIONS = tuple(AUTOCAST)


def choose_threads(asked: int | None, before: int | None, *, exact: bool) -> int:
    """CPU threads of every worker. Kernels split their sums by it, so exact runs keep to what they began with.

    `asked`: by the recipe, and already set; None for the machine's share. `before`: of the checkpoint. `exact`: the
    bits matter.
    """
    wanted = torch.get_num_threads()
    if not exact or before in (None, wanted):
        return wanted
    if asked is None:
        log.info("goes on with %d CPU threads a worker, as it began: gradient_sum is exact", before)
        return before
    log.warning(
        "compute.threads is %d and was %d before: the weights will not be bit-identical to those of a run "
        "with one number throughout",
        wanted,
        before,
    )
    return wanted


def choose_precision(asked: str, before: str | None, device: torch.device) -> str:
    """One of `PRECISIONS`. `asked` auto: what the stage began with (`before`, of the checkpoint), whatever device it
    goes on; at its beginning bfloat16 on a GPU that computes in it."""
    if asked != "auto":
        return asked
    own = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if before not in (None, own):
        log.warning(
            "goes on in %s, as it began, though precision: auto would choose %s here; --from STAGE begins again",
            before,
            own,
        )
    return before or own
