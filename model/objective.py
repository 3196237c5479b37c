"""Which relations are compared, with what weight: the objective as data, its terms as sums that add up.

MiniLM (arXiv 2002.10957, eq. 6-10): attention Q-K and value relation V-V of the last layers, weights 1.
MiniLMv2 (arXiv 2012.15828, section 3.1): Q-Q, K-K and V-V, on re-split relation heads.

Leaves out: the division by the number of sequences or tokens. A term here is an undivided numerator, so that
micro-batches and workers add up before one division by the global `count`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.errors import ModelError
from model.relations import relation_heads, relation_kl, relation_weight
from model.tap import Taps

_PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Relation:
    """softmax(x yᵀ / √d) with x and y each one of "q", "k", "v"; `name` is what it is logged under."""

    name: str
    x: str
    y: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        for part in (self.x, self.y):
            if part not in _PARTS:
                raise ModelError(f"relation {self.name!r} is made of {part!r}; use q, k or v")


@dataclass(frozen=True)
class Objective:
    """A weighted list of relations, compared between the tapped layers of teacher and student.

    reduction: "sequence" or "token" (see `relation_kl`). relation_heads: re-split both sides into so many
    heads.
    """

    relations: tuple[Relation, ...]
    reduction: str = "sequence"
    relation_heads: int | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "relations", tuple(self.relations))
        names = [relation.name for relation in self.relations]
        if not names or len(set(names)) < len(names):
            raise ModelError(
                f"an objective needs one relation or more, each with a name of its own, not {names}"
            )
        if self.reduction not in ("sequence", "token"):
            raise ModelError(f'reduction {self.reduction!r} is not known; use "sequence" or "token"')

    @staticmethod
    def named(name: str, **changes: object) -> "Objective":
        """The paper's objectives: "minilm", "minilmv2"; `changes` replaces fields (reduction, relation_heads,
        …)."""
        if name not in _NAMED:
            raise ModelError(f"objective {name!r} is not known; use one of {', '.join(_NAMED)}")
        return replace(_NAMED[name], **changes)  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, in the order of `term_sums`."""
        return tuple(relation.name for relation in self.relations)

    @property
    def weights(self) -> Tensor:
        """float32 [num_terms]: loss = (weights * term_sums).sum() / count."""
        return torch.tensor([relation.weight for relation in self.relations])

    def term_sums(self, teacher: Taps, student: Taps, mask: Tensor | None) -> Tensor:
        """[num_terms], float32 or better: each relation's undivided, unweighted divergence."""
        self._check_heads(teacher, student)
        return torch.stack([self._term(relation, teacher, student, mask) for relation in self.relations])

    def count(self, mask: Tensor | None, shape: Iterable[int]) -> Tensor:
        """What the sums of this batch are divided by, an int64 scalar; `shape` = (rows, tokens), read if mask
        is None."""
        rows, tokens = shape
        return relation_weight((rows, tokens) if mask is None else mask, self.reduction)

    def check(self, teacher_heads: int, teacher_hidden: int, student_heads: int, student_hidden: int) -> None:
        """ModelError when teacher and student cannot be compared; needs no weights."""
        if self.relation_heads is None:
            if teacher_heads != student_heads:
                raise ModelError(
                    f"the teacher has {teacher_heads} heads and the student {student_heads}; give both the"
                    f" same number, or set relation_heads to divide {teacher_hidden} and {student_hidden}"
                )
            return
        for side, hidden in (("teacher", teacher_hidden), ("student", student_hidden)):
            if self.relation_heads < 1 or hidden % self.relation_heads:
                raise ModelError(
                    f"{self.relation_heads} relation heads do not divide the {side}'s hidden size {hidden}"
                )

    def _check_heads(self, teacher: Taps, student: Taps) -> None:
        sizes = (
            [side.q.shape[1] for side in (teacher, student)],
            [side.q.shape[-1] for side in (teacher, student)],
        )
        (heads_t, heads_s), (size_t, size_s) = sizes
        self.check(heads_t, heads_t * size_t, heads_s, heads_s * size_s)

    def _term(self, relation: Relation, teacher: Taps, student: Taps, mask: Tensor | None) -> Tensor:
        return relation_kl(
            self._part(teacher, relation.x),
            self._part(teacher, relation.y),
            self._part(student, relation.x),
            self._part(student, relation.y),
            mask,
            reduction=f"{self.reduction}_sum",
            teacher_bias=self._bias(teacher, relation),
            student_bias=self._bias(student, relation),
            implementation=self.implementation,
        )

    def _part(self, taps: Taps, name: str) -> Tensor:
        part: Tensor = getattr(taps, name)
        return (
            part
            if self.relation_heads in (None, part.shape[1])
            else relation_heads(part, self.relation_heads)
        )

    def _bias(self, taps: Taps, relation: Relation) -> Tensor | None:
        """A position bias belongs to the attention distribution, which is Q-K and no other pair."""
        if taps.bias is None or (relation.x, relation.y) != ("q", "k"):
            return None
        if self.relation_heads not in (None, taps.q.shape[1]):
            raise ModelError(
                f"{self.relation_heads} relation heads cannot carry a position bias made for"
                f" {taps.q.shape[1]} heads; leave relation_heads out for q-k"
            )
        return taps.bias


_NAMED = {
    "minilm": Objective((Relation("attention", "q", "k"), Relation("value", "v", "v"))),
    "minilmv2": Objective(
        (Relation("query", "q", "q"), Relation("key", "k", "k"), Relation("value", "v", "v"))
    ),
}
