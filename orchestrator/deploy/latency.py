"""How long a batch takes, by runtime, threads and rows: what a service waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from minilm.orchestrator.evaluation.batches import most_tokens
from minilm.orchestrator.evaluation.speed import TOKENS

BATCHES = (1, 32)
SECONDS = 5.0  # of passes a cell
LEAST, MOST = 5, 300  # passes a cell
Open = Callable[[int], Any]  # a number of threads → an encoder that computes with so many


@dataclass(frozen=True)
class Latency:
    """p50, p99: milliseconds of a batch of full rows of `tokens` tokens, over so many passes after a warm-up."""

    runtime: str
    threads: int
    batch: int
    tokens: int
    p50: float
    p99: float
    passes: int


def measure_latency(model: PreTrainedModel, served: Mapping[str, Open]) -> list[Latency]:
    """PyTorch in float32 on the CPU, and each runtime of `served`, with one thread and with all cores."""
    cores = len(os.sched_getaffinity(0))
    tokens = most_tokens(model, TOKENS)
    found = []
    for threads in sorted({1, cores}):
        for batch in BATCHES:
            shape = (batch, tokens)
            ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch_threads(threads):
                found.append(_cell("PyTorch", threads, shape, partial(model, **inputs)))
            inputs["token_type_ids"] = torch.zeros_like(ids)
            for name, open_encoder in served.items():
                found.append(_cell(name, threads, shape, partial(open_encoder(threads), **inputs)))
    return found


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _cell(runtime: str, threads: int, shape: tuple[int, int], run: Callable[[], Any]) -> Latency:
    run()  # warms caches up
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < SECONDS and len(taken) < MOST):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    p50, p99 = (1000 * float(np.percentile(taken, part)) for part in (50, 99))
    return Latency(runtime, threads, *shape, p50, p99, len(taken))


def latency_rows(cells: Sequence[Latency]) -> list[tuple[str, ...]]:
    """A table: a row for each runtime and number of threads, milliseconds p50 / p99 by batch."""
    heads = ("runtime", "threads", *(f"batch {batch}, p50 / p99 ms" for batch in BATCHES))
    rows = [heads]
    for runtime in dict.fromkeys(cell.runtime for cell in cells):
        for threads in dict.fromkeys(cell.threads for cell in cells):
            own = {c.batch: c for c in cells if (c.runtime, c.threads) == (runtime, threads)}
            times = (f"{own[batch].p50:,.1f} / {own[batch].p99:,.1f}" for batch in BATCHES)
            rows.append((runtime, str(threads), *times))
    return rows
