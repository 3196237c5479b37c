"""The objective as data: which terms are compared between teacher and student, as sums that add up.

The objectives with a name are in catalogue.py. Leaves out: the division by the number of sequences or tokens. A term
here is an undivided numerator, so that micro-batches and workers add up before one division by the global `count`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.model.encoder.shape import EncoderShape
from minilm.model.encoder.taps import END_TO_END, EVERY_LAYER, Blocks, Taps
from minilm.model.errors import ModelError
from minilm.model.loss.catalogue import OBJECTIVES
from minilm.model.loss.embedding import CosineDistance, Similarity
from minilm.model.loss.masking import Masked, mask_tokens
from minilm.model.loss.relation_term import Relation
from minilm.model.loss.relations import relation_weight
from minilm.model.loss.soft_labels import SoftLabels
from minilm.model.loss.squared_error import SquaredError
from minilm.model.loss.terms import Pair, Setting, Term

TERMS: dict[str, type[Term]] = {
    "relation": Relation,
    "squared_error": SquaredError,
    "soft_labels": SoftLabels,
    "cosine_distance": CosineDistance,
    "similarity": Similarity,
}


@dataclass(frozen=True)
class Objective:
    """A weighted list of terms, compared between the tapped layers of teacher and student.

    reduction: "sequence" or "token" (see `relation_kl`). relation_heads: re-split both sides into so many
    heads. layer_to_layer: average each term over all student layers, layer i of M against the teacher's
    round-up(i·L/M). mask_token_id, special_ids: of the tokenizer; soft labels mask the one, never the others.
    pooling, dense: of an embedding, see `compatibility.student_layout`.
    """

    relations: tuple[Term, ...]
    reduction: str = "sequence"
    relation_heads: int | None = None
    implementation: str = "auto"
    layer_to_layer: bool = False
    mask_token_id: int | None = None
    special_ids: tuple[int, ...] = ()
    pooling: str | None = None
    dense: bool | None = None

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
        of_sequences = [term.name for term in self.relations if term.per_sequence]
        if of_sequences and (self.reduction == "token" or len(of_sequences) < len(names)):
            raise ModelError(
                f"{', '.join(of_sequences)}: vectors of whole sequences are compared, each counting once; use reduction"
                ' "sequence", and no terms of another kind beside them'
            )
        for term in self.relations if self.layer_to_layer else ():
            if term.per_layer and not EVERY_LAYER.issuperset(term.fields):
                raise ModelError(
                    f"term {term.name!r} reads {', '.join(term.fields)}, and layer-to-layer compares what every"
                    f" layer has: {', '.join(sorted(EVERY_LAYER))}; use another objective, or other relations"
                )

    @staticmethod
    def named(name: str | None = None, **changes: Any) -> "Objective":
        """An objective from plain values, as a recipe or a file holds them.

        name: one of `OBJECTIVES`; `changes` replaces fields. With `relations`, a list of objects with `term` (one of
        `TERMS`, "relation" unless given) and that term's fields, the name may be left out.
        """
        allowed = [field.name for field in dataclasses.fields(Objective)]
        for key in changes:
            if key not in allowed:
                raise ModelError(f"an objective has no {key!r}; use name, {', '.join(allowed)}")
        if name is not None or "relations" not in changes:
            if name not in OBJECTIVES:
                raise ModelError(f"objective {name!r} is not known; use one of {', '.join(OBJECTIVES)}")
            changes = OBJECTIVES[name] | changes
        terms = tuple(_term_from(value) for value in changes.pop("relations"))
        return Objective(terms, **changes)

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, in the order of `term_sums`."""
        return tuple(term.name for term in self.relations)

    @property
    def weights(self) -> Tensor:
        """float32 [num_terms]: loss = (weights * term_sums).sum() / count."""
        return torch.tensor([term.weight for term in self.relations])

    @property
    def fields(self) -> frozenset[str]:
        """The fields of `Taps` that the terms read."""
        return frozenset(field for term in self.relations for field in term.fields)

    @property
    def needs_head(self) -> bool:
        """Whether teacher and student must be loaded and built with a masked-language-model head."""
        return "logits" in self.fields

    @property
    def embeds(self) -> bool:
        """Whether pooled vectors are compared, so that both models run to their end and have a sentence head."""
        return "pooled" in self.fields

    @property
    def takes_blocks(self) -> bool:
        """Whether documents may lie end to end (taps.py): soft labels are of whole rows."""
        return self.fields <= END_TO_END

    def mask_tokens(self, input_ids: Tensor, mask: Tensor | None) -> Masked | None:
        """The masked rows that soft labels are read from, the same for teacher and student; None without them."""
        if not self.needs_head:
            return None
        if self.mask_token_id is None:
            raise ModelError("soft labels need mask_token_id; give the tokenizer's")
        return mask_tokens(input_ids, mask, self.mask_token_id, self.special_ids)

    def term_sums(
        self,
        teacher: Taps,
        student: Taps,
        mask: Tensor | Blocks | None,
        projections: Mapping[str, nn.Module] | None = None,
        masked: Masked | None = None,
    ) -> Tensor:
        """[num_terms], float32 or better: each term's undivided, unweighted divergence.

        mask: bool [batch, tokens], None: all valid; or the blocks in which documents lie in the taps. projections: the
        modules of `projections`, by term. masked: what `mask_tokens` gave.
        """
        whole = parts = [(teacher, student)]
        if isinstance(mask, Blocks):
            parts, mask = [*zip(teacher.split(mask), student.split(mask), strict=True)], None
        sums = []
        for term in self.relations:
            projection = (projections or {}).get(term.name)
            values = []
            for sides in whole if term.per_sequence else parts:
                pairs = [Pair(*layer, mask, masked, projection) for layer in self._layers(*sides, term)]
                values.append(torch.stack([term.sum(self._setting, pair) for pair in pairs]).mean())
            sums.append(torch.stack(values).sum())
        return torch.stack(sums)

    @property
    def by_head(self) -> tuple[Term, ...]:
        """The terms that have a value by head, in the order of `head_sums`."""
        return tuple(term for term in self.relations if term.by_head)

    @property
    def relation_names(self) -> tuple[str, ...]:
        """The names of the terms that have a value by head."""
        return tuple(term.name for term in self.by_head)

    def head_sums(self, teacher: Taps, student: Taps, mask: Tensor | Blocks | None) -> Tensor:
        """Each relation's undivided divergence by head, [relations, heads], without gradients: to be logged.

        The mean over heads is the term.
        """
        if isinstance(mask, Blocks):
            blocks = zip(teacher.split(mask), student.split(mask), strict=True)
            return torch.stack([self.head_sums(t, s, None) for t, s in blocks]).sum(0)
        heads = range(self.relation_heads or teacher.q.shape[1])
        values = student.q.new_zeros(
            len(self.by_head), len(heads), dtype=torch.promote_types(student.q.dtype, torch.float32)
        )
        for row, term in zip(values, self.by_head, strict=True):
            pairs = [Pair(t, s, mask) for t, s in self._layers(teacher, student, term)]
            for head in heads:
                row[head] = torch.stack([term.head_sum(self._setting, pair, head) for pair in pairs]).mean()
        return values

    def count(self, mask: Tensor | None, shape: Iterable[int]) -> Tensor:
        """The number that this batch's sums are divided by, an int64 scalar.

        shape: (rows, tokens), read if mask is None.
        """
        rows, tokens = shape
        return relation_weight((rows, tokens) if mask is None else mask, self.reduction)

    def check(self, teacher: EncoderShape, student: EncoderShape) -> None:
        """ModelError when a term cannot compare encoders of these shapes; needs no weights."""
        for term in self.relations:
            term.check(self._setting, teacher, student)

    def projections(self, teacher_hidden: int, student_hidden: int) -> dict[str, nn.Linear]:
        """The modules that are trained beside a student, by the terms that need one."""
        found = {term.name: term.projection(teacher_hidden, student_hidden) for term in self.relations}
        return {name: projection for name, projection in found.items() if projection is not None}

    def _layers(self, teacher: Taps, student: Taps, term: Term) -> list[tuple[Taps, Taps]]:
        """The layers that a term compares: the tapped ones, and with layer-to-layer the earlier ones too."""
        earlier = self.layer_to_layer and term.per_layer
        return [(teacher, student), *(zip(teacher.earlier, student.earlier, strict=True) if earlier else ())]

    @property
    def _setting(self) -> Setting:
        return Setting(self.reduction, self.relation_heads, self.implementation)


def _term_from(value: Any) -> Term:
    if isinstance(value, Term):
        return value
    values = dict(value)
    kind = values.pop("term", "relation")
    if kind not in TERMS:
        raise ModelError(f"term {kind!r} is not known; use one of {', '.join(TERMS)}")
    try:
        return TERMS[kind](**values)
    except TypeError:
        keys = ", ".join(field.name for field in dataclasses.fields(TERMS[kind]))  # type: ignore[arg-type]
        raise ModelError(f"{kind} {values} does not fit; use {keys}") from None
