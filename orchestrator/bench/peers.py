"""How a step's loss is computed elsewhere: written by hand, and as published projects do. Ways of `bench step`.

By hand means eager attention with `output_attentions=True`, whole maps, and the KL of their softmaxes. The others are
written anew from what these projects do, by name:

    minilmv2.bb     github.com/bloomberg/minilmv2.bb, minilmv2/minilmv2.py (commit 0d78e20)
    bertdistiller   github.com/milistu/bertdistiller, distillation/minilm/trainer.py (commit 9babc9c)
    paddlenlp       github.com/PaddlePaddle/PaddleNLP, examples/model_compression/minilmv2/general_distill.py (commit
                    0607add) and transformers/distill_utils.py, in PyTorch's operations

Theirs is what the models put out and keep, where q, k and v come from, which maps are whole, and in which pieces they
are compared. What is the same for every way `step.py` gives: sizes, rows without padding, a teacher in evaluation mode,
which PaddleNLP's script does not ask for, dropout in the student, autocast, fused AdamW without clipping. Every way has
the gradient of ours. All three projects are published with MiniLMv2's relations, on 48 heads for a base teacher.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minilm.model.loss.objective import Objective
from minilm.model.loss.relation_term import Relation


@dataclass(frozen=True)
class Peer:
    """loss(teacher, student, ids, objective): of rows of `ids` [rows, tokens], a scalar, the mean over them, with the
    student's graph. attention: the implementation in both models, by transformers' name. mixes: whether it has
    relations of two fields, as attention is one of queries and keys."""

    attention: str
    loss: Callable[[Any, Any, Tensor, Objective], Tensor]
    mixes: bool = True


def by_hand(teacher: Any, student: Any, ids: Tensor, objective: Objective) -> Tensor:
    """The attention is that which the model puts out, after dropout; the other relations are of vectors that are
    projected once more."""
    with torch.no_grad():
        targets = list(_maps_by_hand(teacher, ids, objective))
    maps = _maps_by_hand(student, ids, objective)
    return torch.stack([_divergence(*pair) for pair in zip(maps, targets, strict=True)]).sum()


def _maps_by_hand(model: Any, ids: Tensor, objective: Objective) -> Iterator[Tensor]:
    out = model(ids, output_attentions=True, output_hidden_states=True)
    for relation in _relations(objective):
        if relation.x != relation.y:
            yield out.attentions[-1]
            continue
        x = _split(_projections(model)[relation.x](out.hidden_states[-2]), model, objective)
        yield (x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(-1)


def _divergence(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    logs = student_map.float().clamp(min=1e-9).log()
    return functional.kl_div(logs, teacher_map.float(), reduction="none").sum(-1).mean()


def minilmv2_bb(teacher: Any, student: Any, ids: Tensor, objective: Objective) -> Tensor:
    """Both models put out every layer's hidden states and attention, which asks for eager attention, and run to their
    end. q, k and v are projected once more; a relation's scores are whole and compared row by row."""
    mask = torch.ones_like(ids)
    asked = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    teacher.requires_grad_(False)
    teacher_out = teacher(ids, **asked)
    student_out = student(ids, **asked)
    return _compared_row_by_row((teacher, teacher_out), (student, student_out), mask, objective)


def bertdistiller(teacher: Any, student: Any, ids: Tensor, objective: Objective) -> Tensor:
    """As minilmv2.bb, with PyTorch's own attention, and without anybody's attention put out. The teacher's q, k and v
    are projected with a graph, which nothing uses."""
    mask = torch.ones_like(ids)
    asked = {"attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        teacher_out = teacher(ids, **asked)
    student_out = student(ids, **asked)
    return _compared_row_by_row((teacher, teacher_out), (student, student_out), mask, objective)


def paddlenlp(teacher: Any, student: Any, ids: Tensor, objective: Objective) -> Tensor:
    """q, k and v of every layer are kept as they are projected; both models run to their end. A relation's scores get
    a mask and are compared whole.

    The original has them until the next step, here they go when the loss is there.
    """
    mask = torch.ones_like(ids)
    with torch.no_grad():
        teacher_kept = _keep_vectors(teacher, ids, mask)
    student_kept = _keep_vectors(student, ids, mask)
    padding = ((1 - mask) * -1e9)[:, None, None]
    losses = []
    for relation in _relations(objective):
        target, scores = (
            _product(x, x) + padding
            for x in (
                _split(teacher_kept[-1][relation.x], teacher, objective),
                _split(student_kept[-1][relation.x], student, objective),
            )
        )
        losses.append(functional.kl_div(scores.log_softmax(-1), target.softmax(-1), reduction="sum"))
    rows, heads, tokens, _ = scores.shape
    return torch.stack(losses).sum() / (heads * tokens * rows)


def _keep_vectors(model: Any, ids: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    """Of every layer q, k and v, [rows, tokens, hidden]."""
    kept: list[dict[str, Tensor]] = [{} for _ in model.encoder.layer]
    hooks = [
        projection.register_forward_hook(lambda _, __, out, own=own, field=field: own.update({field: out}))
        for layer, own in enumerate(kept)
        for field, projection in _projections(model, layer).items()
    ]
    try:
        model(ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _relations(objective: Objective) -> list[Relation]:
    return [term for term in objective.relations if isinstance(term, Relation)]


def _projections(model: Any, layer: int = -1) -> dict[str, Any]:
    attention = model.encoder.layer[layer].attention.self
    return {"q": attention.query, "k": attention.key, "v": attention.value}


def _split(x: Tensor, model: Any, objective: Objective) -> Tensor:
    """[rows, tokens, hidden] -> [rows, heads, tokens, size of a head]."""
    heads = objective.relation_heads or model.config.num_attention_heads
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-1, -2) / math.sqrt(x.shape[-1])


def _scores(model: Any, hidden: Tensor, objective: Objective) -> Iterator[Tensor]:
    """Of every relation in turn the last layer's scores, [rows, heads, tokens, tokens]; `hidden`: before it."""
    vectors = {
        field: _split(project(hidden), model, objective) for field, project in _projections(model).items()
    }
    for relation in _relations(objective):
        yield _product(vectors[relation.x], vectors[relation.y])


def _compared_row_by_row(
    teacher: tuple[Any, Any], student: tuple[Any, Any], mask: Tensor, objective: Objective
) -> Tensor:
    """Of models and their outputs: each row is cut to its length, which the host waits for, and compared by itself."""
    targets, scores = (_scores(model, out.hidden_states[-2], objective) for model, out in (teacher, student))
    total = torch.zeros((), device=mask.device)
    for target, own in zip(targets, scores, strict=True):
        target = target.detach()
        for row, length in enumerate(mask.sum(-1).tolist()):
            logs = own[row, :, :length, :length].log_softmax(-1).flatten(0, 1)
            parts = target[row, :, :length, :length].softmax(-1).flatten(0, 1)
            total = total + functional.kl_div(logs, parts, reduction="sum") / logs.shape[0] / len(mask)
    return total


PEERS = {
    "by-hand": Peer("eager", by_hand),
    "minilmv2.bb": Peer("eager", minilmv2_bb),
    "bertdistiller": Peer("sdpa", bertdistiller),
    "paddlenlp": Peer("eager", paddlenlp, mixes=False),
}
