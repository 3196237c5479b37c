"""One fine-tuning: an encoder with a fresh head learns a task's train split and is scored on its dev splits.

A short loop over plain transformers models. Head, order of rows and dropout depend on the seed alone, and the global
random state is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from minilm.model.encoder.build import quiet_transformers
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.batches import (
    collate,
    encode,
    most_tokens,
    shuffled_batches,
    sorted_batches,
)
from minilm.orchestrator.evaluation.metrics import score
from minilm.orchestrator.evaluation.protocols import Setting
from minilm.orchestrator.evaluation.read_tables import Examples, read_split
from minilm.orchestrator.evaluation.tasks import UNTRAINED, Task

WARMUP, WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 0.01, 1.0
CURVE_POINTS = 50
Curve = list[list[float]]  # step and loss


def check_head(model_type: str, kind: str) -> None:
    """UserError where transformers has no head for tasks of this kind on encoders of this architecture."""
    if kind in UNTRAINED:
        return
    heads = {"spans": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES}
    if model_type not in heads.get(kind, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        raise UserError(
            f"transformers has no head for tasks of {kind} on a {model_type}; leave such tasks out, or evaluate "
            f"another model"
        )


def with_head(encoder: PreTrainedModel, kind: str, num_labels: int, seed: int) -> PreTrainedModel:
    """The encoder's weights under a new head, drawn from `seed`: of classes, of one number, or of spans."""
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    config.num_labels = num_labels
    if kind == "score":
        config.problem_type = "regression"
    check_head(config.model_type, kind)
    chosen = AutoModelForQuestionAnswering if kind == "spans" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(seed)
        model = chosen.from_config(config, dtype=torch.float32)
    base = getattr(model, model.base_model_prefix)
    report = base.load_state_dict(encoder.state_dict(), strict=False)
    lacking = [key for key in report.missing_keys if "pooler" not in key]
    if lacking:  # its head needs weights that the bare encoder has not
        raise UserError(
            f"a {config.model_type} with a head has other weights than the encoder ({lacking[0]}, …)"
        )
    return model


def fine_tune(
    encoder: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    data: Path,
    setting: Setting,
    *,
    seed: int,
    device: torch.device,
    autocast: torch.dtype | None,
    train_rows: int | None = None,
) -> tuple[dict[str, float], Curve]:
    """The task's metrics on its first dev split (those of further ones, and of each language, as METRIC_NAME), and the
    loss by step."""
    examples = subset(read_split(task, data, "train"), train_rows)
    model = with_head(encoder, task.kind, task.num_labels, seed)
    tokens = most_tokens(model, setting.tokens)
    rows = encode(tokenizer, examples.first, examples.second, tokens)
    kind = torch.float32 if task.kind == "score" else torch.int64
    labels = torch.as_tensor(examples.labels).to(kind)

    def loss(numbers: np.ndarray) -> Tensor:
        inputs = collate(tokenizer, [rows[i] for i in numbers], device)
        return model(**inputs, labels=labels[numbers].to(device)).loss

    lengths = [len(row["input_ids"]) for row in rows]
    curve = train(model, loss, lengths, setting, seed=seed, device=device, autocast=autocast)
    found: dict[str, float] = {}
    for split in task.dev:
        dev = read_split(task, data, split)
        predicted = predict(model, tokenizer, task, dev, tokens, device, autocast)
        found |= _scores(task, dev, predicted, "" if split == task.dev[0] else f"_{split}")
    return found, curve


def _scores(task: Task, dev: Examples, predicted: np.ndarray, end: str) -> dict[str, float]:
    if dev.languages is None:
        return {f"{name}{end}": value for name, value in score(task.metrics, dev.labels, predicted).items()}
    languages = np.asarray(dev.languages)
    by_language = {
        language: score(task.metrics, dev.labels[languages == language], predicted[languages == language])
        for language in sorted(set(dev.languages))
    }
    means = {n: float(np.mean([found[n] for found in by_language.values()])) for n in task.metrics}
    return means | {f"{n}_{lang}": found[n] for lang, found in by_language.items() for n in task.metrics}


def subset(examples: Examples, rows: int | None) -> Examples:
    """The same `rows` random rows for every model and seed; all where that is no fewer."""
    if rows is None or rows >= len(examples):
        return examples
    return examples.pick(np.sort(np.random.default_rng(0).permutation(len(examples))[:rows]))


def predict(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    examples: Examples,
    tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> np.ndarray:
    """Classes int64 [rows], or float64 numbers."""
    rows = encode(tokenizer, examples.first, examples.second, tokens)
    found = np.empty((len(rows), task.num_labels), dtype=np.float64)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for numbers in sorted_batches([len(row["input_ids"]) for row in rows], 64):
            inputs = collate(tokenizer, [rows[i] for i in numbers], device)
            found[numbers] = model(**inputs).logits.float().cpu().numpy()
    found = np.nan_to_num(found)  # a training that diverged predicts nothing
    return found[:, 0] if task.kind == "score" else found.argmax(axis=1)


def train(
    model: PreTrainedModel,
    loss_of: Callable[[np.ndarray], Tensor],
    lengths: Sequence[int],
    setting: Setting,
    *,
    seed: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Curve:
    """Train in place by the setting. loss_of: the mean loss of the rows with these numbers; lengths: of all rows."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(_groups(model), lr=setting.learning_rate, eps=1e-8, fused=True)
    steps = setting.epochs * math.ceil(len(lengths) / setting.batch)
    warmup = max(1, round(WARMUP * steps))
    curve: Curve = []
    step = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of dropout
        for epoch in range(setting.epochs):
            for numbers in shuffled_batches(lengths, setting.batch, seed, epoch):
                share = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = setting.learning_rate * share
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    loss = loss_of(numbers)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if step == 1 or step == steps or step % max(1, steps // CURVE_POINTS) == 0:
                    curve.append([step, float(loss.detach())])
    return curve


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are vectors, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
