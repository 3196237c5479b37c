"""The tensors that a tapped encoder hands out."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

EVERY_LAYER = frozenset(
    {"q", "k", "v", "bias"}
)  # the fields that any watched layer has, not the tapped one alone


class Taps(NamedTuple):
    """The inputs of one layer's attention: q, k, v [batch, heads, tokens, head_size]; q and k after rotation.

    bias: an additive position bias on the scores, broadcastable to [batch, heads, tokens, tokens], or None.
    If watched: hidden, the layer's output [batch, tokens, hidden]; earlier, the taps of earlier layers;
    logits [batch, k, vocabulary] of the model's head, at the k positions asked for; pooled [batch, width], the
    sentence head's vectors, float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    hidden: Tensor | None = None
    earlier: "tuple[Taps, ...]" = ()
    logits: Tensor | None = None
    pooled: Tensor | None = None

    def like(self, other: "Taps") -> "Taps":
        """Each tensor in the dtype of its counterpart: under autocast hidden states can differ from q, k and v."""
        cast = {
            name: own.to(its.dtype)
            for name, own, its in zip(self._fields, self, other, strict=True)
            if isinstance(own, Tensor) and isinstance(its, Tensor)
        }
        earlier = tuple(own.like(its) for own, its in zip(self.earlier, other.earlier, strict=True))
        return self._replace(**cast, earlier=earlier)

    def tensors(self, fields: Collection[str]) -> list[Tensor]:
        """The tensors of these fields, those of earlier layers included."""
        own = [value for name, value in self._asdict().items() if name in fields and value is not None]
        return own + [tensor for taps in self.earlier for tensor in taps.tensors(fields)]
