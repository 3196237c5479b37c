"""The terms that an objective is made of: each reads parts of both sides' taps and gives one undivided sum.

    Relation        KL between softmaxed products of two parts: the papers' terms (see relations.py)
    SquaredError    one part itself, through a learned projection where sizes differ
    SoftLabels      the head's prediction for masked tokens (see softlabels.py)

Invariants: what stands at padded positions changes nothing; gradients go to the student's side only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.relations import query_weights, relation_heads, relation_kl
from minilm.model.loss.soft_labels import Masked, soft_label_rows

_PARTS = ("q", "k", "v", "hidden")


@dataclass(frozen=True)
class Setting:
    """What all terms of an objective share: the reduction, the relation heads (or None), the implementation."""

    reduction: str
    relation_heads: int | None
    implementation: str


@dataclass(frozen=True)
class Relation:
    """softmax(x yᵀ / √d) with x, y of "q", "k", "v", "hidden", compared by KL; `name` is what it is logged under.

    Hidden states are split into as many heads as the attention has (or `relation_heads`).
    """

    name: str
    x: str
    y: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        for part in (self.x, self.y):
            if part not in _PARTS:
                raise ModelError(f"relation {self.name!r} is made of {part!r}; use {', '.join(_PARTS)}")

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.x, self.y, "bias") if (self.x, self.y) == ("q", "k") else (self.x, self.y)

    def sum(
        self, setting: Setting, teacher: Taps, student: Taps, mask: Tensor | None, head: int | None = None
    ) -> Tensor:
        """The undivided divergence, of all heads, or of one without gradients."""
        (t_x, t_y, t_bias), (s_x, s_y, s_bias) = (
            self._side(setting, taps, head) for taps in (teacher, student)
        )
        return relation_kl(
            t_x,
            t_y,
            s_x,
            s_y,
            mask,
            reduction=f"{setting.reduction}_sum",
            teacher_bias=t_bias,
            student_bias=s_bias,
            implementation=setting.implementation,
        )

    def _side(self, setting: Setting, taps: Taps, head: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x, y = (_heads(part, taps, setting.relation_heads) for part in (self.x, self.y))
        bias = self._bias(setting, taps)
        if head is None:
            return x, y, bias
        one = slice(head, head + 1)
        if bias is not None:
            bias = (bias[..., one, :, :] if bias.dim() > 2 and bias.shape[-3] > 1 else bias).detach()
        return (
            x[:, one].detach(),
            y[:, one].detach(),
            bias,
        )  # else tiles would make the gradients on their way

    def _bias(self, setting: Setting, taps: Taps) -> Tensor | None:
        """A position bias belongs to the attention distribution, which is Q-K and no other pair."""
        if taps.bias is None or (self.x, self.y) != ("q", "k"):
            return None
        if setting.relation_heads not in (None, taps.q.shape[1]):
            raise ModelError(
                f"{setting.relation_heads} relation heads cannot carry a position bias made for"
                f" {taps.q.shape[1]} heads; leave relation_heads out for q-k"
            )
        return taps.bias


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error of one part, heads concatenated, with a learned projection where sizes differ."""

    name: str
    part: str = "v"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.part not in _PARTS:
            raise ModelError(f"squared error {self.name!r} is of {self.part!r}; use {', '.join(_PARTS)}")

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,)

    def sum(
        self,
        setting: Setting,
        teacher: Taps,
        student: Taps,
        mask: Tensor | None,
        projection: nn.Module | None,
    ) -> Tensor:
        """The undivided error, a mean over dimensions."""
        target, got = (_concatenated(self.part, taps) for taps in (teacher, student))
        with torch.autocast(got.device.type, enabled=False):
            dtype = torch.promote_types(got.dtype, torch.float32)
            got = got.to(dtype) if projection is None else projection(got.to(dtype))
            if mask is not None:
                got = got.masked_fill(~mask[..., None], 0.0)
                target = target.masked_fill(~mask[..., None], 0.0)
            rows_BT = (got - target.detach().to(dtype)).square().mean(dim=-1)
            return (rows_BT * query_weights(mask, got.shape, setting.reduction, got)).sum()

    @staticmethod
    def projection(student_size: int, teacher_size: int) -> nn.Linear:
        """A linear map whose start depends on the sizes alone: no random state is drawn from."""
        projection = nn.Linear(student_size, teacher_size, bias=False, device="meta").to_empty(device="cpu")
        start = torch.randn(teacher_size, student_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            projection.weight.copy_(start / student_size**0.5)
        return projection


@dataclass(frozen=True)
class SoftLabels:
    """The head's prediction for masked tokens, compared by KL over the vocabulary."""

    name: str
    weight: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        return ("logits",)

    def sum(self, teacher: Taps, student: Taps, masked: Masked) -> Tensor:
        """The undivided divergence: a mean over a sequence's masked tokens, summed over sequences."""
        assert teacher.logits is not None and student.logits is not None
        rows_BK = soft_label_rows(teacher.logits, student.logits).masked_fill(~masked.valid, 0.0)
        return (rows_BK * query_weights(masked.valid, rows_BK.shape, "sequence", rows_BK)).sum()


Term = Relation | SquaredError | SoftLabels


def _heads(name: str, taps: Taps, num_relation_heads: int | None) -> Tensor:
    """The part as [batch, heads, tokens, size], re-split where the objective says so."""
    part: Tensor = getattr(taps, name)
    if name == "hidden":
        part = part[:, None]
    wanted = num_relation_heads or taps.q.shape[1]
    return part if part.shape[1] == wanted else relation_heads(part, wanted)


def _concatenated(name: str, taps: Taps) -> Tensor:
    """The part as [batch, tokens, hidden]."""
    part: Tensor = getattr(taps, name)
    return part if name == "hidden" else part.transpose(1, 2).flatten(-2)
