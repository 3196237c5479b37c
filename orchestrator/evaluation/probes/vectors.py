"""One vector a row (of several documents: the first one's): its own of the sentence head in a stage of embeddings,
else the mean over its valid tokens of the states that the stage trains.

An objective of q, k and v ends at the tap, and what lies behind it holds its first values: then the values at the tap
are taken, all heads beside each other. Where an objective reads more, it is the output of the tapped layer or, with the
last one tapped, of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.data.stream import partition
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.orchestrator.evaluation.batches import collate, encode, most_tokens, sorted_batches
from minilm.orchestrator.evaluation.probes.evaluator import HeldOutPass


def row_vectors(encoder: TappedEncoder, given: HeldOutPass) -> np.ndarray:
    """float64 [rows, width] of the held-out rows, the same on every worker; each computes a part of them.

    The rows of a micro-batch are in the order of their groups of like length, which is the same for every encoder.
    """
    found = []
    for corpus, rows, _ in given.parts():
        vectors = torch.zeros(rows, width(encoder))
        place: dict[int, int] = {}  # where the next rows of a micro-batch go
        for batch in given.batches_of(corpus.rows, rows, one_each=True):
            start = place.get(batch.number, batch.number * given.micro_batch)
            place[batch.number] = end = start + len(batch.ids)
            vectors[start:end] = pooled(encoder, batch.ids, batch.mask)
        found.append(given.world.merge(vectors))
    return torch.cat(found).double().numpy()


def text_vectors(
    encoder: TappedEncoder,
    tokenizer: Any,
    texts: Sequence[str],
    given: HeldOutPass,
    *,
    tokens: int,
    batch: int,
) -> np.ndarray:
    """float64 [texts, width], the same on every worker; each computes a part of them. tokens: of a text at most."""
    rows = encode(tokenizer, texts, None, most_tokens(encoder.model, tokens))
    vectors = torch.zeros(len(texts), width(encoder))
    for numbers in _own_batches([len(row["input_ids"]) for row in rows], batch, given):
        inputs = collate(tokenizer, [rows[i] for i in numbers], given.world.device)
        vectors[torch.from_numpy(numbers)] = pooled(
            encoder, inputs["input_ids"], inputs["attention_mask"].bool()
        )
    return given.world.merge(vectors).double().numpy()


def _own_batches(lengths: Sequence[int], batch: int, given: HeldOutPass) -> Iterator[np.ndarray]:
    batches = list(sorted_batches(lengths, batch))
    mine = partition(len(batches), given.world.rank, given.world.size)
    for done, number in enumerate(mine):
        given.progress(done, len(mine))
        yield batches[number]


def width(encoder: TappedEncoder) -> int:
    """Numbers of a vector: of the sentence head, of all heads at the tap, or the hidden size."""
    config = encoder.model.config
    if encoder.head is not None:
        return encoder.head.layout.width(config.hidden_size)
    if not encoder.stops_at_tap:
        return int(config.hidden_size)
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


def pooled(encoder: TappedEncoder, ids: Tensor, mask: Tensor | None) -> Tensor:
    """float32 [rows, width] on the CPU. ids int64, mask bool [rows, tokens]."""
    if encoder.head is not None:
        return encoder(ids, mask).pooled.float().cpu()
    if encoder.stops_at_tap:
        states = encoder(ids, mask).v.transpose(1, 2).flatten(2)  # [rows, tokens, heads * head_size]
    elif encoder.layer < encoder.model.config.num_hidden_layers:
        states = encoder(ids, mask).hidden
    else:
        states = encoder.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    states = states.float()
    if mask is None:
        return states.mean(dim=1).cpu()
    valid = mask.unsqueeze(-1).float()
    return ((states * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)).cpu()
