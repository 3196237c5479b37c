"""The learning rate as a function of the step alone (MiniLM, section 4.1: linear warm-up, linear decay)."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: str = "linear",
    decay_steps: int | None = None,
) -> float:
    """The learning rate of update number `step` (0-based).

    Rises linearly and reaches `peak` at update `warmup_steps - 1`. After that, "constant" stays there; "linear" and
    "cosine" (half a wave, Loshchilov and Hutter 2017, equation 5 without restarts) fall and would be 0 at `num_steps`.
    "wsd" (warm-up, stable, decay; Hägele et al. 2024, 2405.18392) stays there and falls linearly in the last
    `decay_steps`, so that no rate before them depends on `num_steps`.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is outside 0..{num_steps - 1}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    match schedule:
        case "linear":
            return peak * (num_steps - step) / (num_steps - warmup_steps)
        case "cosine":
            return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps))) / 2
        case "constant":
            return peak
        case "wsd":
            assert decay_steps is not None
            return peak * min(1.0, (num_steps - step) / decay_steps)
    raise ValueError(f"schedule {schedule!r} is not known; use linear, cosine, constant or wsd")
