"""SQuAD 2.0: questions and passages become windows of tokens, a model learns the span, its spans become answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.batches import collate, most_tokens, sorted_batches
from minilm.orchestrator.evaluation.fine_tune import Curve, train, with_head
from minilm.orchestrator.evaluation.protocols import Setting
from minilm.orchestrator.evaluation.read_tables import squad_file
from minilm.orchestrator.evaluation.squad_score import score_squad

# candidates for each end, and the longest answer, as BERT's script has them
BEST, MOST_ANSWER_TOKENS = 20, 30


@dataclass(frozen=True)
class Question:
    """answers: accepted texts, none where there is no answer. start: of the first answer in the passage, in
    characters."""

    id: str
    text: str
    passage: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Window:
    """A question with a piece of its passage. inputs: what the model takes. offsets: characters of the passage of each
    token, None for others. span: the tokens of the answer; both are the CLS token's where it is not in this piece."""

    question: int
    inputs: dict[str, list[int]]
    offsets: list[tuple[int, int] | None]
    cls: int
    span: tuple[int, int]


def read_questions(data: Path, split: str) -> list[Question]:
    """All questions of a split. UserError with file and question where it is not as published."""
    path = squad_file(data, split)
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            Question(
                id=str(qa["id"]),
                text=qa["question"].strip(),
                passage=paragraph["context"],
                answers=tuple(answer["text"] for answer in qa["answers"]),
                start=int(qa["answers"][0]["answer_start"]) if qa["answers"] else -1,
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        if not all(isinstance(text, str) for q in found for text in (q.passage, *q.answers)):
            raise TypeError("a passage or an answer is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not SQuAD 2.0's JSON ({error!r}); put the published file in its place"
        ) from error
    if not found:
        raise UserError(f"{path} holds no questions; put the published file in its place")
    for question in found:
        if question.answers:
            there = question.passage[question.start : question.start + len(question.answers[0])]
            if there != question.answers[0]:
                raise UserError(
                    f"{path}: question {question.id}: its passage has {there!r} at {question.start}, and the answer is "
                    f"{question.answers[0]!r}; put the published file in its place"
                )
    return found


def windows(questions: list[Question], tokenizer: Any, tokens: int, stride: int) -> list[Window]:
    """Every piece of every passage, at most `tokens` long with its question, `stride` tokens shared by neighbours.

    A question and what neighbours share have at most a third of `tokens` each, so that a piece goes on by some.
    """
    found = []
    third = tokens // 3
    for number, question in enumerate(questions):
        pieces = tokenizer(
            shortened(question.text, tokenizer, third),
            question.passage,
            truncation="only_second",
            max_length=tokens,
            stride=min(stride, third),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for piece, ids in enumerate(pieces["input_ids"]):
            parts = pieces.sequence_ids(piece)
            offsets = [
                tuple(pair) if part == 1 else None
                for pair, part in zip(pieces["offset_mapping"][piece], parts, strict=True)
            ]
            cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            inputs = {name: pieces[name][piece] for name in tokenizer.model_input_names if name in pieces}
            found.append(Window(number, inputs, offsets, cls, _span(question, offsets, cls)))
    return found


def shortened(text: str, tokenizer: Any, tokens: int) -> str:
    """The beginning of a text, of at most so many tokens."""
    if len(text.encode()) <= tokens:  # a token has at least a byte
        return text
    cut = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=tokens, return_offsets_mapping=True
    )
    return text[: max((end for _, end in cut["offset_mapping"]), default=0)]


def _span(question: Question, offsets: list[tuple[int, int] | None], cls: int) -> tuple[int, int]:
    if not question.answers:
        return cls, cls
    start, end = question.start, question.start + len(question.answers[0])
    inside = [i for i, pair in enumerate(offsets) if pair and pair[0] < end and pair[1] > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:  # type: ignore[index]
        return cls, cls  # a part of the answer only
    return inside[0], inside[-1]


def fine_tune_spans(
    encoder: PreTrainedModel,
    tokenizer: Any,
    data: Path,
    setting: Setting,
    *,
    seed: int,
    device: torch.device,
    autocast: torch.dtype | None,
    train_rows: int | None = None,
) -> tuple[dict[str, float], Curve]:
    """f1 and exact on the dev split, and the loss by step."""
    questions = read_questions(data, "train")
    if train_rows is not None and train_rows < len(questions):
        kept = np.sort(np.random.default_rng(0).permutation(len(questions))[:train_rows])
        questions = [questions[i] for i in kept]
    model = with_head(encoder, "spans", 2, seed)
    tokens = most_tokens(model, setting.tokens)
    rows = windows(questions, tokenizer, tokens, setting.stride)
    spans = torch.tensor([row.span for row in rows])

    def loss(numbers: np.ndarray) -> Tensor:
        inputs = collate(tokenizer, [rows[i].inputs for i in numbers], device)
        start, end = spans[numbers].to(device).unbind(dim=1)
        return model(**inputs, start_positions=start, end_positions=end).loss

    lengths = [len(row.inputs["input_ids"]) for row in rows]
    curve = train(model, loss, lengths, setting, seed=seed, device=device, autocast=autocast)
    dev = read_questions(data, "dev")
    return answer(model, tokenizer, dev, tokens, setting, device, autocast), curve


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: list[Question],
    tokens: int,
    setting: Setting,
    device: torch.device,
    autocast: torch.dtype | None,
) -> dict[str, float]:
    """The scores of the model's answers."""
    rows = windows(questions, tokenizer, tokens, setting.stride)
    best: list[tuple[float, str]] = [(-np.inf, "") for _ in questions]
    none = np.full(len(questions), np.inf)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for numbers in sorted_batches([len(row.inputs["input_ids"]) for row in rows], setting.batch):
            out = model(**collate(tokenizer, [rows[i].inputs for i in numbers], device))
            starts, ends = (
                np.nan_to_num(x.float().cpu().numpy()) for x in (out.start_logits, out.end_logits)
            )
            for i, start, end in zip(numbers, starts, ends, strict=True):
                row = rows[i]
                question = questions[row.question]
                none[row.question] = min(none[row.question], start[row.cls] + end[row.cls])
                best[row.question] = max(
                    best[row.question], best_span(start, end, row.offsets, question.passage)
                )
    return score_squad(
        {q.id: q.answers for q in questions},
        {q.id: text for q, (_, text) in zip(questions, best, strict=True)},
        {q.id: float(n - value) for q, n, (value, _) in zip(questions, none, best, strict=True)},
    )


def best_span(
    start: np.ndarray, end: np.ndarray, offsets: list[tuple[int, int] | None], passage: str
) -> tuple[float, str]:
    """The best sum of logits of a span inside the passage, and its text; (-inf, "") where there is none."""
    length = len(offsets)
    best: tuple[float, str] = (-np.inf, "")
    for i in np.argsort(-start[:length], kind="stable")[:BEST]:
        for j in np.argsort(-end[:length], kind="stable")[:BEST]:
            first, last = offsets[i], offsets[j]
            if first is None or last is None or not 0 <= j - i < MOST_ANSWER_TOKENS:
                continue
            if start[i] + end[j] > best[0]:
                best = (float(start[i] + end[j]), passage[first[0] : last[1]])
    return best
