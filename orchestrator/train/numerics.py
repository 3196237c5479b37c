"""CPU threads and precision: chosen once per stage and stored in its checkpoints, because a later change alters the
result.

Rank 0 chooses, from the checkpoint if there is one, and all ranks follow.
"""

from __future__ import annotations

import logging
import math
import time

import torch

log = logging.getLogger(__name__)

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
PRECISIONS = tuple(AUTOCAST)
_WORTHWHILE = 0.75  # of a product's time in float32: what is not a product gains nothing


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


def cpu_computes_in_bfloat16() -> bool:
    """Whether the processor has units for bfloat16 (AMX, AVX512-BF16) and a product is faster with them.

    The product of a layer is measured, some 20 ms: virtual machines name units that they emulate.
    """
    units = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    if not units:
        return False
    with torch.autocast("cpu", enabled=False):
        exact = torch.ones(256, 768), torch.ones(768, 768)
        seconds = {dtype: math.inf for dtype in (torch.float32, torch.bfloat16)}
        for _ in range(5):
            for dtype, best in seconds.items():
                x, weights = (factor.to(dtype) for factor in exact)
                begin = time.perf_counter()
                torch.mm(x, weights)
                seconds[dtype] = min(best, time.perf_counter() - begin)
    share = seconds[torch.bfloat16] / seconds[torch.float32]
    log.info("a product in bfloat16 takes %.2f of its time in float32 here (%s)", share, ", ".join(units))
    return share < _WORTHWHILE


def choose_precision(requested: str, before: str | None, device: torch.device) -> str:
    """One of `PRECISIONS`.

    "auto" is the precision that the stage began with (`before`, from the checkpoint), on whatever device it goes on;
    at its beginning, bfloat16 on a GPU or CPU that computes in it and float32 elsewhere.
    """
    if requested != "auto":
        return requested
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_computes_in_bfloat16()
    own = "bfloat16" if fast else "float32"
    if before not in (None, own):
        log.warning(
            "goes on in %s, as it began, though precision: auto would choose %s here; --from STAGE begins again",
            before,
            own,
        )
    return before or own
