"""What of teacher and student is compared: the objective as data, its terms as sums that add up.

    minilm            attention Q-K and value relation V-V of the last layers (MiniLM, 2002.10957, eq. 6-10)
    minilmv2          Q-Q, K-K, V-V on re-split relation heads (MiniLMv2, 2012.15828, section 3.1)
    attention-only    minilm without the value relation (MiniLM, table 5)
    value-mse         values by squared error, not their relation, through a projection (MiniLM, table 6)
    layer-to-layer    minilm's terms, the mean over the student's layers, mapped uniformly (MiniLM, table 7)
    soft-label-mlm    the teacher's predictions for masked tokens, no relation (the baseline of MiniLM, table 3)
    hidden-relation   the relation of the last hidden states instead of the values' (MiniLM, section 3.2)

Leaves out: the division by the number of sequences or tokens. A term here is an undivided numerator, so that
micro-batches and workers add up before one division by the global `count`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.relations import relation_weight
from minilm.model.loss.soft_labels import Masked, mask_tokens
from minilm.model.loss.terms import Relation, Setting, SoftLabels, SquaredError, Term


@dataclass(frozen=True)
class Objective:
    """A weighted list of terms, compared between the tapped layers of teacher and student.

    reduction: "sequence" or "token" (see `relation_kl`). relation_heads: re-split both sides into so many
    heads. layer_to_layer: average each term over all student layers, layer i of M against the teacher's
    round-up(i·L/M). mask_token_id, special_ids: of the tokenizer; soft labels mask the one, never the others.
    """

    relations: tuple[Term, ...]
    reduction: str = "sequence"
    relation_heads: int | None = None
    implementation: str = "auto"
    layer_to_layer: bool = False
    mask_token_id: int | None = None
    special_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [term.name for term in self.relations]
        if not names or len(set(names)) < len(names):
            raise ModelError(
                f"an objective needs one relation or more, each with a name of its own, not {names}"
            )
        if self.reduction not in ("sequence", "token"):
            raise ModelError(f'reduction {self.reduction!r} is not known; use "sequence" or "token"')
        if self.needs_head and self.reduction == "token":
            raise ModelError(
                'soft labels count by sequence: only some tokens have one; use reduction "sequence"'
            )

    @staticmethod
    def named(name: str | None = None, **changes: Any) -> "Objective":
        """An objective from plain values, as a recipe or a file holds them.

        name: one of `OBJECTIVES`; `changes` replaces fields. With `relations`, a list of objects with the
        keys name, x, y, weight (a relation) or name, part, weight (a squared error), the name may be left
        out.
        """
        allowed = [field.name for field in fields(Objective)]
        for key in changes:
            if key not in allowed:
                raise ModelError(f"an objective has no {key!r}; use name, {', '.join(allowed)}")
        if "relations" in changes:
            changes["relations"] = tuple(_term_from(value) for value in changes["relations"])
            if name is None:
                return Objective(**changes)
        if name not in OBJECTIVES:
            raise ModelError(f"objective {name!r} is not known; use one of {', '.join(OBJECTIVES)}")
        return replace(OBJECTIVES[name], **changes)

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, in the order of `term_sums`."""
        return tuple(term.name for term in self.relations)

    @property
    def weights(self) -> Tensor:
        """float32 [num_terms]: loss = (weights * term_sums).sum() / count."""
        return torch.tensor([term.weight for term in self.relations])

    @property
    def parts(self) -> frozenset[str]:
        """The fields of `Taps` that the terms read. With "hidden" the tapped layer runs to its end."""
        return frozenset(part for term in self.relations for part in term.parts)

    @property
    def needs_head(self) -> bool:
        """Whether teacher and student must be loaded and built with a masked-language-model head."""
        return "logits" in self.parts

    @property
    def needs_bias(self) -> bool:
        """Whether a term reads the attention scores, to which some encoders add a position bias."""
        return "bias" in self.parts

    def mask_tokens(self, input_ids: Tensor, mask: Tensor | None) -> Masked | None:
        """The masked rows that soft labels are read from, the same for teacher and student; None without
        such."""
        if not self.needs_head:
            return None
        if self.mask_token_id is None:
            raise ModelError("soft labels need mask_token_id; give the tokenizer's")
        return mask_tokens(input_ids, mask, self.mask_token_id, self.special_ids)

    def term_sums(
        self,
        teacher: Taps,
        student: Taps,
        mask: Tensor | None,
        projections: Mapping[str, nn.Module] | None = None,
        masked: Masked | None = None,
    ) -> Tensor:
        """[num_terms], float32 or better: each term's undivided, unweighted divergence."""
        extra = projections or {}, masked
        return torch.stack([self._term(term, teacher, student, mask, *extra) for term in self.relations])

    @property
    def relation_names(self) -> tuple[str, ...]:
        """The terms that have a value by head, in the order of `head_sums`."""
        return tuple(term.name for term in self.relations if isinstance(term, Relation))

    def head_sums(self, teacher: Taps, student: Taps, mask: Tensor | None) -> Tensor:
        """For looking at: each relation's undivided divergence by head, [relations, heads], without gradients.

        The mean over heads is the term.
        """
        heads = range(self.relation_heads or teacher.q.shape[1])
        relations = [term for term in self.relations if isinstance(term, Relation)]
        sides = self._sides(teacher, student)
        values = student.q.new_zeros(
            len(relations), len(heads), dtype=torch.promote_types(student.q.dtype, torch.float32)
        )
        for row, term in zip(values, relations, strict=True):
            for head in heads:
                row[head] = torch.stack([term.sum(self._setting, t, s, mask, head) for t, s in sides]).mean()
        return values

    def count(self, mask: Tensor | None, shape: Iterable[int]) -> Tensor:
        """What this batch's sums are divided by, an int64 scalar; shape = (rows, tokens), read if mask is None."""
        rows, tokens = shape
        return relation_weight((rows, tokens) if mask is None else mask, self.reduction)

    def check(self, teacher_heads: int, teacher_hidden: int, student_heads: int, student_hidden: int) -> None:
        """ModelError when teacher and student cannot be compared; needs no weights."""
        if not any(isinstance(term, Relation) for term in self.relations):
            return
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

    def projections(self, teacher_hidden: int, student_hidden: int) -> dict[str, nn.Linear]:
        """What is trained beside a student, by term: a linear map for each squared error of unequal sizes."""
        return {
            term.name: SquaredError.projection(student_hidden, teacher_hidden)
            for term in self.relations
            if isinstance(term, SquaredError) and teacher_hidden != student_hidden
        }

    def _term(
        self,
        term: Term,
        teacher: Taps,
        student: Taps,
        mask: Tensor | None,
        projections: Mapping[str, nn.Module],
        masked: Masked | None,
    ) -> Tensor:
        if isinstance(term, SoftLabels):
            assert masked is not None
            return term.sum(teacher, student, masked)
        sides = self._sides(teacher, student)
        if isinstance(term, Relation):
            sums = [term.sum(self._setting, t, s, mask) for t, s in sides]
        else:
            sums = [term.sum(self._setting, t, s, mask, projections.get(term.name)) for t, s in sides]
        return torch.stack(sums).mean()

    def _sides(self, teacher: Taps, student: Taps) -> list[tuple[Taps, Taps]]:
        earlier = zip(teacher.earlier, student.earlier, strict=True) if self.layer_to_layer else ()
        return [(teacher, student), *earlier]

    @property
    def _setting(self) -> Setting:
        return Setting(self.reduction, self.relation_heads, self.implementation)


def _term_from(value: Any) -> Term:
    if isinstance(value, Term):
        return value
    kind = SquaredError if "part" in value else Relation
    try:
        return kind(**value)
    except TypeError:
        raise ModelError(
            f"relation {dict(value)} does not fit; use name, x, y and weight, or for a squared error name,"
            " part and weight"
        ) from None


_ATTENTION, _VALUE = Relation("attention", "q", "k"), Relation("value", "v", "v")
OBJECTIVES = {
    "minilm": Objective((_ATTENTION, _VALUE)),
    "minilmv2": Objective((Relation("query", "q", "q"), Relation("key", "k", "k"), _VALUE)),
    "attention-only": Objective((_ATTENTION,)),
    "value-mse": Objective((_ATTENTION, SquaredError("value"))),
    "layer-to-layer": Objective((_ATTENTION, _VALUE), layer_to_layer=True),
    "soft-label-mlm": Objective((SoftLabels("soft_labels"),)),
    "hidden-relation": Objective((_ATTENTION, Relation("hidden", "hidden", "hidden"))),
}
