"""What a term of an objective is: it reads fields of both sides' taps and gives one undivided sum.

To add one, write a class in a file of its own (squared_error.py is a short example), and a row in `objective.TERMS`;
for a name in recipes, a row in catalogue.py. A term that reads a new tensor also needs it handed out: a field of
`Taps`, filled by the collector of attention_hook.py or by `TappedEncoder.forward`.

Invariants that every term keeps: what stands at padded positions changes nothing; gradients go to the student's side
only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from minilm.model.encoder.shape import EncoderShape
from minilm.model.encoder.taps import Taps
from minilm.model.loss.masking import Masked


@dataclass(frozen=True)
class Setting:
    """What all terms of an objective share: the reduction, the relation heads (or None), the implementation."""

    reduction: str
    relation_heads: int | None
    implementation: str


class Pair(NamedTuple):
    """What a term compares: the taps of two layers.

    mask: bool [batch, tokens], True where a token is valid, None: all. masked: the masked tokens of soft labels.
    projection: the student's module that the term asked for with `projection`.
    """

    teacher: Taps
    student: Taps
    mask: Tensor | None = None
    masked: Masked | None = None
    projection: nn.Module | None = None


class Term(ABC):
    """A frozen dataclass with at least these two fields: `name` is what the term is logged under."""

    name: str
    weight: float
    per_layer: ClassVar[bool] = (
        True  # with layer-to-layer: the mean over the student's layers, not the last alone
    )
    by_head: ClassVar[bool] = False  # whether there is a `head_sum`
    per_sequence: ClassVar[bool] = False  # a value of a whole sequence: there is no mean over tokens

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """The fields of `Taps` that it reads."""

    @abstractmethod
    def sum(self, setting: Setting, pair: Pair) -> Tensor:
        """The undivided, unweighted divergence: a scalar, float32 or better, with gradients to the student."""

    def head_sum(self, setting: Setting, pair: Pair, head: int) -> Tensor:
        """The undivided divergence of one head, without gradients; `sum` is the mean over heads."""
        raise NotImplementedError(f"{type(self).__name__} has no heads")

    def check(self, setting: Setting, teacher: EncoderShape, student: EncoderShape) -> None:  # noqa: B027
        """ModelError when the term cannot compare encoders of these shapes; unless overridden, it can."""

    def projection(self, teacher_hidden: int, student_hidden: int) -> nn.Linear | None:
        """A module to be trained beside the student, on CPU, the same every time; None where it needs none."""
        return None
