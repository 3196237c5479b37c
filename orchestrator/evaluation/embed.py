"""Vectors of texts: how well their cosine orders pairs that people have judged, and finds what answers a query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from minilm.model.encoder.sentence_head import SentenceHead
from minilm.orchestrator.evaluation.batches import collate, encode, most_tokens, sorted_batches
from minilm.orchestrator.evaluation.metrics import METRICS, score
from minilm.orchestrator.evaluation.read_tables import has_split, read_split
from minilm.orchestrator.evaluation.retrieval import find_sets, read_set
from minilm.orchestrator.evaluation.tasks import TASKS, Task


def vectors_of(
    model: PreTrainedModel,
    head: SentenceHead,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: int,
    batch: int,
    device: torch.device,
) -> np.ndarray:
    """float32 [texts, width]: what the head makes of the last hidden states (special tokens too), of length 1."""
    rows = encode(tokenizer, texts, None, most_tokens(model, tokens))
    found = np.empty((len(texts), head.layout.width(model.config.hidden_size)), dtype=np.float32)
    model.to(device).eval()
    head.to(device)
    with torch.inference_mode():
        for numbers in sorted_batches([len(row["input_ids"]) for row in rows], batch):
            inputs = collate(tokenizer, [rows[i] for i in numbers], device)
            states = model(**inputs).last_hidden_state
            vectors = head(states, inputs["attention_mask"].bool())
            found[numbers] = normalize(vectors, dim=-1).cpu().numpy()
    return found


def cosine_similarity(
    model: PreTrainedModel,
    head: SentenceHead,
    tokenizer: Any,
    task: Task,
    data: Path,
    *,
    tokens: int,
    batch: int,
    device: torch.device,
) -> dict[str, float]:
    """The task's metrics of its first split that is there; those of further ones as METRIC_SPLIT."""
    found: dict[str, float] = {}
    splits = [split for split in task.dev if has_split(task, data, split)]
    for split in splits:
        examples = read_split(task, data, split)
        texts = list(dict.fromkeys([*examples.first, *(examples.second or ())]))
        vectors = vectors_of(model, head, tokenizer, texts, tokens=tokens, batch=batch, device=device)
        place = {text: i for i, text in enumerate(texts)}
        one = vectors[[place[text] for text in examples.first]]
        other = vectors[[place[text] for text in examples.second or ()]]
        scores = score(task.metrics, examples.labels, (one * other).sum(axis=1))
        end = "" if split == splits[0] else f"_{split}"
        found |= {f"{name}{end}": value for name, value in scores.items()}
    return found


def search(
    model: PreTrainedModel,
    head: SentenceHead,
    tokenizer: Any,
    data: Path,
    prompts: tuple[str, str],
    *,
    tokens: int,
    batch: int,
    device: torch.device,
) -> dict[str, float]:
    """nDCG@10 as the mean over sets, each with equal weight, and of each set as METRIC_SET.

    prompts: before queries and texts. A set's value is the mean over its queries; texts with equal cosines share their
    places.
    """
    (metric,) = TASKS["nanobeir"].metrics
    by_set: dict[str, float] = {}
    for files in find_sets(data):
        found = read_set(files)
        distinct = {text: number for number, text in enumerate(dict.fromkeys(filter(None, found.texts)))}
        queries, answers = (
            torch.from_numpy(
                vectors_of(
                    model,
                    head,
                    tokenizer,
                    [prompt + text for text in asked],
                    tokens=tokens,
                    batch=batch,
                    device=device,
                )
            )
            for prompt, asked in zip(prompts, (found.queries, list(distinct)), strict=True)
        )
        never = torch.full((len(queries), 1), -2.0)  # below every cosine: texts without a character
        cosines = torch.cat([queries @ answers.T, never], dim=1).numpy()
        places = np.array([distinct.get(text, len(distinct)) for text in found.texts])
        values = []
        for grades, row in zip(found.grades, cosines, strict=True):
            wanted = np.zeros(len(places))
            wanted[list(grades)] = list(grades.values())
            values.append(METRICS[metric](wanted, row[places]))
        by_set[files.name] = float(np.mean(values))
    return {metric: float(np.mean(list(by_set.values())))} | {
        f"{metric}_{name}": value for name, value in by_set.items()
    }
