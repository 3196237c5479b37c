"""How big and how fast encoders are on this machine: whole models in float32, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from minilm.model.encoder.build import count_parameters
from minilm.orchestrator.evaluation.batches import most_tokens
from minilm.orchestrator.system.versions import processor_name

TOKENS, BATCH, SINGLES, BATCHES = 128, 32, 30, 3


@dataclass(frozen=True)
class Size:
    """flops: multiplications and additions a token in rows of `TOKENS`, matrices alone. megabytes: of float32 weights
    (10^6 bytes). p50, p99: milliseconds of one row; tokens_per_second: of batches of `BATCH` rows."""

    layers: int
    hidden: int
    parameters: int
    megabytes: float
    flops: float
    p50: float
    p99: float
    tokens_per_second: float


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """This machine in words: its processor or GPU, threads, the version of torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure(models: Sequence[PreTrainedModel], device: torch.device) -> list[Size]:
    """The size of each, and its speed after a warm-up; the models take turns, so that a slower moment of the machine
    meets them all."""
    for model in models:
        model.to(device).eval()
    singles = _turns(models, 1, SINGLES, device)
    batches = _turns(models, BATCH, BATCHES, device)
    return [
        Size(
            layers=model.config.num_hidden_layers,
            hidden=model.config.hidden_size,
            parameters=count_parameters(model),
            megabytes=4 * count_parameters(model) / 1e6,
            flops=flops_per_token(model),
            p50=1000 * float(np.percentile(single, 50)),
            p99=1000 * float(np.percentile(single, 99)),
            tokens_per_second=BATCH * most_tokens(model, TOKENS) / float(np.median(batch)),
        )
        for model, single, batch in zip(models, singles, batches, strict=True)
    ]


def row_milliseconds(model: PreTrainedModel) -> float:
    """The median for one row, after a warm-up, on the fastest device of this machine."""
    device = this_device()
    (taken,) = _turns([model.to(device).eval()], 1, SINGLES // 3, device)
    return 1000 * float(np.median(taken))


def _turns(
    models: Sequence[PreTrainedModel], rows: int, rounds: int, device: torch.device
) -> list[list[float]]:
    """Seconds of each pass of each model."""
    taken: list[list[float]] = [[] for _ in models]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for number in range(rounds + 1):
            for seconds, model in zip(taken, models, strict=True):
                shape = (rows, most_tokens(model, TOKENS))
                ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number > 0:  # the first warms caches up
                    seconds.append(time.perf_counter() - begin)
    return taken


def flops_per_token(model: PreTrainedModel) -> float:
    """Of a forward pass: two for each weight of a linear layer, and of attention's two products."""
    weights = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name
    )
    config = model.config
    return 2.0 * weights + 4.0 * config.num_hidden_layers * most_tokens(model, TOKENS) * config.hidden_size
