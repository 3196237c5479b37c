"""The squared error of one field as a term, through a learned projection where sizes differ (MiniLM, table 6)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.catalogue import RELATION_FIELDS
from minilm.model.loss.relations import query_weights
from minilm.model.loss.terms import Pair, Setting, Term


@dataclass(frozen=True)
class SquaredError(Term):
    """Mean squared error of one field of `Taps`, heads concatenated; the mean is over dimensions."""

    name: str
    field: str = "v"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.field not in RELATION_FIELDS:
            raise ModelError(
                f"squared error {self.name!r} is of {self.field!r}; use {', '.join(RELATION_FIELDS)}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        target, got = (_concatenated(self.field, taps) for taps in (pair.teacher, pair.student))
        mask = pair.mask
        with torch.autocast(got.device.type, enabled=False):
            dtype = torch.promote_types(got.dtype, torch.float32)
            got = got.to(dtype) if pair.projection is None else pair.projection(got.to(dtype))
            if mask is not None:
                got = got.masked_fill(~mask[..., None], 0.0)
                target = target.masked_fill(~mask[..., None], 0.0)
            rows_BT = (got - target.detach().to(dtype)).square().mean(dim=-1)
            return (rows_BT * query_weights(mask, got.shape, setting.reduction, got)).sum()

    def projection(self, teacher_hidden: int, student_hidden: int) -> nn.Linear | None:
        """A linear map whose start depends on the sizes alone: no random state is drawn from."""
        if teacher_hidden == student_hidden:
            return None
        projection = nn.Linear(student_hidden, teacher_hidden, bias=False, device="meta").to_empty(
            device="cpu"
        )
        start = torch.randn(teacher_hidden, student_hidden, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            projection.weight.copy_(start / student_hidden**0.5)
        return projection


def _concatenated(name: str, taps: Taps) -> Tensor:
    """The field as [batch, tokens, hidden]."""
    field: Tensor = getattr(taps, name)
    return field if name == "hidden" else field.transpose(1, 2).flatten(-2)
