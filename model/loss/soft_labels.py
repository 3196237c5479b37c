"""Soft-label distillation of a masked language model: the baseline that MiniLM is compared with (table 3).

At the tokens that masking.py replaces, the student's prediction is pulled to the teacher's: KL over the vocabulary at
temperature 1. Invariant: no host sync; logits are computed at the chosen positions only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minilm.model.loss.relations import query_weights
from minilm.model.loss.terms import Pair, Setting, Term


@dataclass(frozen=True)
class SoftLabels(Term):
    """The head's prediction for masked tokens: a mean over a sequence's masked tokens, summed over sequences."""

    name: str
    weight: float = 1.0
    per_layer = False  # only the model's end has logits

    @property
    def fields(self) -> tuple[str, ...]:
        return ("logits",)

    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        assert pair.teacher.logits is not None and pair.student.logits is not None and pair.masked is not None
        valid = pair.masked.valid
        rows_BK = soft_label_rows(pair.teacher.logits, pair.student.logits).masked_fill(~valid, 0.0)
        return (rows_BK * query_weights(valid, rows_BK.shape, "sequence", rows_BK)).sum()


def soft_label_rows(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary: [batch, k, vocabulary] -> [batch, k], float32 or better."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher, student = (
        logits.to(dtype).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits)
    )
    return (teacher.exp() * (teacher - student)).sum(dim=-1)
