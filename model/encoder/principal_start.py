"""A narrower student that starts from its teacher's layers, projected on what the teacher's hidden states vary in.

`initialize.from_teacher` gives a narrower student the leading dimensions of every hidden state, which are no better
than others. Here the student's states start as the projections of the teacher's on the `hidden` directions with the
largest second moment over the valid tokens of sample rows: of the embeddings and of every layer that the student takes,
each layer weighed alike. What reads hidden states is multiplied by these directions from the right, what writes them
from the left; heads and feed-forward parts are sliced as there. A norm scales single dimensions, which no projection
keeps: its weight and bias are fitted, dimension by dimension, to what the teacher's norm gives for the same rows (least
squares). Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilm.model.encoder.families import PLAIN
from minilm.model.encoder.initialize import (
    check_start,
    cut,
    from_teacher,
    head_sizes,
    picked_layers,
    teachers_name,
)
from minilm.model.encoder.shape import family_of, shape_of

if TYPE_CHECKING:  # a recipe is checked without modelling code
    from transformers import PreTrainedModel

Rows = Sequence[tuple[Tensor, Tensor | None]]  # int64 ids [rows, tokens], bool mask of valid tokens or None


@torch.no_grad()
def from_principal_directions(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> None:
    """Give a student, built at random, this start, in place; one of its teacher's width gets `from_teacher`'s.

    rows: a sample of what the student will learn from. Both models are on the CPU. ModelError as `check_start`.
    """
    theirs, own = shape_of(teacher.config), shape_of(student.config)
    check_start(theirs, own, "teacher-pca")
    from_teacher(student, teacher)
    if own.hidden == theirs.hidden:
        return
    teacher.eval()
    directions = student_directions(student, teacher, rows)
    _project(student, teacher, directions)
    _fit_norms(student, teacher, rows, directions)


@torch.no_grad()
def student_directions(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> Tensor:
    """float32 [teacher's hidden, student's hidden]: a state of the teacher times this is the student's.

    A LayerNorm takes the mean over dimensions away, and with it one direction: there the student's states have sum 0.
    """
    picked, hidden = _picked(student, teacher), student.config.hidden_size
    if any(isinstance(module, nn.LayerNorm) for module in student.modules()):
        return principal_directions(teacher, rows, picked, hidden - 1) @ _without_mean(hidden)
    return principal_directions(teacher, rows, picked, hidden)


@torch.no_grad()
def principal_directions(teacher: PreTrainedModel, rows: Rows, layers: Sequence[int], number: int) -> Tensor:
    """float32 [hidden, number], orthonormal: the directions of the largest second moments, the largest first."""
    hidden = teacher.config.hidden_size
    moments = torch.zeros(1 + len(layers), hidden, hidden, dtype=torch.float64)
    for ids, mask in rows:
        states = teacher(
            input_ids=ids, attention_mask=_int(mask, ids), output_hidden_states=True
        ).hidden_states
        for place, layer in enumerate((0, *layers)):
            valid = _valid(states[layer], mask).double()
            moments[place] += valid.T @ valid
    moments /= moments.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    _, vectors = torch.linalg.eigh(moments.sum(dim=0))
    found = vectors.flip(1)[:, :number]
    largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    return (found * largest.sign()).float()  # which of two opposite vectors eigh gives is nobody's choice


def _without_mean(size: int) -> Tensor:
    """float32 [size - 1, size], orthonormal rows of sum 0: a reflection of all unit vectors but one, so that each row
    stays near one dimension."""
    normal = torch.full((size,), -(size**-0.5))
    normal[-1] += 1
    return (torch.eye(size) - 2 * torch.outer(normal, normal) / normal.dot(normal))[:-1]


def _project(student: PreTrainedModel, teacher: PreTrainedModel, directions: Tensor) -> None:
    """The student's weights from the teacher's: hidden states along `directions`, the rest cut."""
    family, picked = family_of(student.config), _picked(student, teacher)
    source = teacher.state_dict()
    for name, target in student.state_dict().items():
        origin = teachers_name(name, picked)
        if origin not in source:
            continue
        weight, blocks = source[origin], family.blocks(name.rpartition(".")[0])
        for dim, kinds in enumerate((blocks.rows, blocks.columns)[: weight.dim()]):
            size = target.shape[dim]
            if kinds == (PLAIN,) and (weight.shape[dim], size) == tuple(directions.shape):
                weight = torch.tensordot(weight, directions, dims=([dim], [0])).movedim(-1, dim)
            else:
                weight = cut(weight, dim, kinds, size, *head_sizes(teacher, student))
        target.copy_(weight)


def _fit_norms(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, directions: Tensor) -> None:
    """Weight and bias of every norm of hidden states, so that it gives the projection of what the teacher's gives."""
    modules, picked = dict(teacher.named_modules()), _picked(student, teacher)
    fits = {}
    for name, norm in student.named_modules():
        weight = getattr(norm, "weight", None)
        other = modules.get(teachers_name(name, picked))
        if weight is None or weight.dim() != 1 or other is None:
            continue
        if (len(other.weight), len(weight)) == tuple(directions.shape):
            fits[name] = (_Fit(norm, directions), other)
    for ids, mask in rows:
        with _watched(fits.values(), mask):
            teacher(input_ids=ids, attention_mask=_int(mask, ids))
    for fit, _ in fits.values():
        fit.finish()


class _Fit:
    """Sums of one norm's least squares."""

    def __init__(self, norm: Any, directions: Tensor):
        self.norm, self.directions = norm, directions
        self.bias = getattr(norm, "bias", None)
        norm.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()
        self.count, self.sums = 0, torch.zeros(4, directions.shape[1], dtype=torch.float64)

    def add(self, given: Tensor, out: Tensor) -> None:
        """Float [tokens, hidden] each: what went into the teacher's norm, and what came out."""
        x = self.norm(given @ self.directions).double()
        y = (out @ self.directions).double()
        self.count += len(x)
        self.sums += torch.stack((x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)))

    def finish(self) -> None:
        x, y, xx, xy = self.sums / max(self.count, 1)
        if self.bias is None:
            self.norm.weight.copy_(xy / xx.clamp(min=1e-12))
        else:
            slope = (xy - x * y) / (xx - x * x).clamp(min=1e-12)
            self.norm.weight.copy_(slope)
            self.bias.copy_(y - slope * x)


@contextmanager
def _watched(fits: Iterable[tuple[_Fit, Any]], mask: Tensor | None) -> Iterator[None]:
    def hook(fit: _Fit) -> Callable[..., None]:
        return lambda module, given, out: fit.add(_valid(given[0], mask), _valid(out, mask))

    handles = [other.register_forward_hook(hook(fit)) for fit, other in fits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _picked(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    return picked_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers)


def _valid(states: Tensor, mask: Tensor | None) -> Tensor:
    """[tokens, hidden] of the valid tokens."""
    return states.flatten(0, -2) if mask is None else states[mask]


def _int(mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids) if mask is None else mask.long()
