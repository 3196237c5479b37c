"""Terms that compare pooled vectors: the student's text vector is pulled to the teacher's (LEAF, arXiv 2509.12539).

Vectors are compared at length 1, where the squared distance is 2 - 2·cos; the term is half of it, the cosine distance,
which is also what is measured on held-out rows.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from minilm.model.errors import ModelError
from minilm.model.loss.terms import Pair, Setting, Term


@dataclass(frozen=True)
class VectorTerm(Term):
    """dims: of the vectors the first so many numbers, at length 1 again (Matryoshka, arXiv 2205.13147); None: all."""

    name: str
    weight: float = 1.0
    dims: int | None = None
    per_layer: ClassVar[bool] = False
    per_sequence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dims is not None and self.dims < 1:
            raise ModelError(f"term {self.name!r} is of {self.dims} dims; use 1 or more")

    @property
    def fields(self) -> tuple[str, ...]:
        return ("pooled",)

    def _vectors(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        """Teacher's and student's [batch, dims], of length 1, and which rows have a valid token, None: all."""
        assert pair.teacher.pooled is not None and pair.student.pooled is not None
        teacher, student = (
            normalize(side[:, : self.dims], dim=-1)
            for side in (pair.teacher.pooled.detach(), pair.student.pooled)
        )
        return teacher, student, None if pair.mask is None else pair.mask.any(dim=1)


@dataclass(frozen=True)
class CosineDistance(VectorTerm):
    """1 - cos of teacher's and student's vector, a value a row."""

    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        teacher_BD, student_BD, valid_B = self._vectors(pair)
        distance_B = 1 - (teacher_BD * student_BD).sum(dim=-1)
        return (distance_B if valid_B is None else distance_B.masked_fill(~valid_B, 0.0)).sum()


@dataclass(frozen=True)
class Similarity(VectorTerm):
    """The squared difference of two rows' cosines, the mean over the rows that are computed together, a value a row."""

    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        teacher_BD, student_BD, valid_B = self._vectors(pair)
        difference_BB = (teacher_BD @ teacher_BD.T - student_BD @ student_BD.T).square()
        if valid_B is None:
            return difference_BB.mean(dim=1).sum()
        both_BB = valid_B[:, None] & valid_B[None]
        return difference_BB.masked_fill(~both_BB, 0.0).sum() / valid_B.sum().clamp(min=1)
