"""Texts become batches of token ids, sorted by length so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.model.encoder.families import FAMILIES

POOL_BATCHES = 32  # a shuffled epoch is sorted by length within so many batches


def most_tokens(model: Any, asked: int) -> int:
    """How many tokens a row may have: `asked`, or the model's own limit where that is less."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", asked)
    if family := FAMILIES.get(config.model_type):
        limit -= family.reserved_positions(config.pad_token_id)
    return min(asked, limit) if limit > 0 else asked


def encode(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, tokens: int
) -> list[dict[str, list[int]]]:
    """What the model takes for each row, unpadded, cut to `tokens`."""
    found = tokenizer(
        list(first), None if second is None else list(second), truncation=True, max_length=tokens
    )
    return [{key: found[key][i] for key in found} for i in range(len(first))]


def collate(tokenizer: Any, rows: Sequence[dict[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """int64 [rows, longest of them] of each input."""
    padded = tokenizer.pad({key: [row[key] for row in rows] for key in rows[0]}, return_tensors="pt")
    return {key: value.to(device) for key, value in padded.items()}


def sorted_batches(lengths: Sequence[int], batch: int) -> Iterator[np.ndarray]:
    """Row numbers, longest rows first: what would not fit into memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def shuffled_batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, a pure function of seed and epoch: rows shuffled, sorted by length within pools, and
    the batches shuffled again."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    sizes, batches = np.asarray(lengths), []
    for start in range(0, len(order), batch * POOL_BATCHES):
        pool = order[start : start + batch * POOL_BATCHES]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        batches += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [batches[i] for i in generator.permutation(len(batches))]
