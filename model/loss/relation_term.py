"""A relation as a term: the KL between softmaxed products of two fields, the papers' terms (see relations.py)."""

import math
from dataclasses import dataclass

from torch import Tensor

from minilm.model.encoder.shape import EncoderShape
from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.catalogue import RELATION_FIELDS
from minilm.model.loss.relations import relation_heads, relation_kl
from minilm.model.loss.terms import Pair, Setting, Term


@dataclass(frozen=True)
class Relation(Term):
    """softmax(x yᵀ / √d) with x, y of "q", "k", "v", "hidden", compared by KL.

    Hidden states are split into as many heads as the attention has (or `relation_heads`).
    """

    name: str
    x: str
    y: str
    weight: float = 1.0
    by_head = True

    def __post_init__(self) -> None:
        for field in (self.x, self.y):
            if field not in RELATION_FIELDS:
                raise ModelError(
                    f"relation {self.name!r} is made of {field!r}; use {', '.join(RELATION_FIELDS)}"
                )

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.x, self.y, "bias") if self._is_attention else (self.x, self.y)

    def check(self, setting: Setting, teacher: EncoderShape, student: EncoderShape) -> None:
        heads = setting.relation_heads
        if heads is None:
            if teacher.heads != student.heads:
                biased = self._is_attention and (teacher.position_bias or student.position_bias)
                split = f", or set relation_heads to divide {teacher.hidden} and {student.hidden}"
                raise ModelError(
                    f"the teacher has {teacher.heads} heads and the student {student.heads}; give both the same"
                    f" number{'' if biased else split}"
                )
            return
        for side, shape in (("teacher", teacher), ("student", student)):
            if heads < 1 or shape.hidden % heads:
                raise ModelError(
                    f"{heads} relation heads do not divide the {side}'s hidden size {shape.hidden}; give a divisor"
                    f" of {math.gcd(teacher.hidden, student.hidden)}"
                )
        for shape in (teacher, student):
            if shape.position_bias:
                self._check_bias(heads, shape.heads)

    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        return self._divergence(setting, pair, None)

    def head_sum(self, setting: Setting, pair: Pair, head: int) -> Tensor:
        return self._divergence(setting, pair, head)

    def _divergence(self, setting: Setting, pair: Pair, head: int | None) -> Tensor:
        (t_x, t_y, t_bias), (s_x, s_y, s_bias) = (
            self._side(setting, taps, head) for taps in (pair.teacher, pair.student)
        )
        return relation_kl(
            t_x,
            t_y,
            s_x,
            s_y,
            pair.mask,
            reduction=f"{setting.reduction}_sum",
            teacher_bias=t_bias,
            student_bias=s_bias,
            implementation=setting.implementation,
        )

    def _side(self, setting: Setting, taps: Taps, head: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x, y = (_heads(field, taps, setting.relation_heads) for field in (self.x, self.y))
        bias = self._bias(setting, taps)
        if head is None:
            return x, y, bias
        one = slice(head, head + 1)
        if bias is not None:
            bias = (bias[..., one, :, :] if bias.dim() > 2 and bias.shape[-3] > 1 else bias).detach()
        # Detached: the tiled implementation computes gradients together with the value.
        return x[:, one].detach(), y[:, one].detach(), bias

    @property
    def _is_attention(self) -> bool:
        """A position bias belongs to the attention distribution, which is Q-K and no other pair."""
        return (self.x, self.y) == ("q", "k")

    def _bias(self, setting: Setting, taps: Taps) -> Tensor | None:
        if taps.bias is None or not self._is_attention:
            return None
        self._check_bias(setting.relation_heads, taps.q.shape[1])
        return taps.bias

    def _check_bias(self, relation_heads: int | None, heads: int) -> None:
        if self._is_attention and relation_heads not in (None, heads):
            raise ModelError(
                f"{relation_heads} relation heads cannot carry a position bias made for {heads} heads; leave"
                " relation_heads out for q-k"
            )


def _heads(name: str, taps: Taps, num_relation_heads: int | None) -> Tensor:
    """The field as [batch, heads, tokens, size], re-split where the objective says so."""
    field: Tensor = getattr(taps, name)
    if name == "hidden":
        field = field[:, None]
    wanted = num_relation_heads or taps.q.shape[1]
    return field if field.shape[1] == wanted else relation_heads(field, wanted)
