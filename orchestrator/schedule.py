"""The learning rate as a function of the step alone (MiniLM, section 4.1: linear warm-up, linear decay)."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int) -> float:
    """The rate used by update number `step` (0-based).

    Rises linearly, reaches `peak` at update `warmup_steps - 1`, falls linearly and would be 0 at `num_steps`.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is outside 0..{num_steps - 1}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (num_steps - step) / (num_steps - warmup_steps)
