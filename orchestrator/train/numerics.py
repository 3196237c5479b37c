"""CPU threads and precision: chosen once per stage and stored in its checkpoints, because a later change alters the
result.

Rank 0 chooses, from the checkpoint if there is one, and all ranks follow.
"""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
PRECISIONS = tuple(AUTOCAST)


def choose_threads(requested: int | None, before: int | None, *, exact: bool) -> int:
    """The number of CPU threads of every worker.

    Kernels split their sums by it, so a run with exact gradient sums keeps the number that it began with.
    requested: the recipe's, already set; None for the machine's share. before: the checkpoint's. exact: whether the
    bits matter.
    """
    wanted = torch.get_num_threads()
    if not exact or before in (None, wanted):
        return wanted
    if requested is None:
        log.info(
            "goes on with %d CPU threads per worker, as it began, because gradient sums are exact", before
        )
        return before
    log.warning(
        "compute.threads is %d and was %d before: the weights will not be bit-identical to those of a run "
        "with one number throughout",
        wanted,
        before,
    )
    return wanted


def choose_precision(requested: str, before: str | None, device: torch.device) -> str:
    """One of `PRECISIONS`.

    "auto" is the precision that the stage began with (`before`, from the checkpoint), on whatever device it goes on;
    at its beginning, bfloat16 on a GPU that supports it and float32 elsewhere.
    """
    if requested != "auto":
        return requested
    own = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if before not in (None, own):
        log.warning(
            "goes on in %s, as it began, though precision: auto would choose %s here; --from STAGE begins again",
            before,
            own,
        )
    return before or own
