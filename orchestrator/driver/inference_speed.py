"""Tokens a second of an exported encoder on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn


def inference_speed(
    models: Sequence[nn.Module], *, batch: int, tokens: int, vocab_size: int, rounds: int = 5
) -> list[float]:
    """Tokens a second of each whole encoder on this machine's CPU, median of `rounds` interleaved passes.

    The models take turns, so that a slower moment of the machine meets them all.
    """
    ids = torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_number in range(rounds + 1):
            for taken, model in zip(seconds, models, strict=True):
                start = time.perf_counter()
                model(input_ids=ids)
                if round_number > 0:  # the first pass warms caches up
                    taken.append(time.perf_counter() - start)
    return [batch * tokens / statistics.median(taken) for taken in seconds]
