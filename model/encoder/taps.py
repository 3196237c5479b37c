"""The tensors that a tapped encoder hands out, and how documents of several lengths lie in them.

Documents end to end are one sequence to all that looks at a token alone (embeddings, linear layers, norms): nothing is
computed for padding. Only attention and the terms of an objective look at more than one token; they take the documents
block by block, so pairs of tokens of different documents are never computed either.
"""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

EVERY_LAYER = frozenset(
    {"q", "k", "v", "bias"}
)  # the fields that any watched layer has, not the tapped one alone
END_TO_END = EVERY_LAYER | {"hidden", "pooled"}  # all but logits, whose positions are those of whole rows


class Block(NamedTuple):
    """`rows` documents of `width` tokens each, without padding."""

    rows: int
    width: int


class Blocks(tuple[Block, ...]):
    """Blocks of documents, the widest first, end to end in one sequence: token t of document r of a block that begins
    at s is s + r · width + t. Tokens behind the last block belong to none; nothing sees them."""

    @property
    def widest(self) -> int:
        return self[0].width

    def squares(self, of_widest: Tensor | None) -> "list[Tensor | None]":
        """The mask or bias [..., width, width] of each block's documents, from that of the widest: both say which
        distances are seen, and how. Each is cut from the one before it, so that its gradient is no larger than that."""
        squares = [of_widest]
        for block in self:
            last = squares[-1]
            squares.append(None if last is None else last[..., : block.width, : block.width])
        return squares[1:]

    def split(self, x: Tensor, dim: int) -> list[Tensor]:
        """Views of x [1, …, tokens, …], one a block: [rows, …, width, …]. dim: that of the tokens."""
        sizes = [block.rows * block.width for block in self]
        *parts, _rest = x.split([*sizes, x.shape[dim] - sum(sizes)], dim=dim)
        return [
            part.unflatten(dim, block).squeeze(0).movedim(dim - 1, 0)
            for part, block in zip(parts, self, strict=True)
        ]


_active = threading.local()


def active_blocks() -> Blocks | None:
    """How documents lie in the forward that this thread is in; None: a row each."""
    blocks: Blocks | None = getattr(_active, "blocks", None)
    return blocks


@contextmanager
def lying_in(blocks: Blocks) -> Iterator[None]:
    """Within it, attention takes a sequence for these blocks."""
    outer = active_blocks()
    _active.blocks = blocks
    try:
        yield
    finally:
        _active.blocks = outer


class Taps(NamedTuple):
    """The inputs of one layer's attention: q, k, v [batch, heads, tokens, head_size]; q and k after rotation.

    bias: an additive position bias on the scores, broadcastable to [batch, heads, tokens, tokens], or None.
    If watched: hidden, the layer's output [batch, tokens, hidden]; earlier, the taps of earlier layers;
    logits [batch, k, vocabulary] of the model's head, at the k positions asked for; pooled [batch, width], the
    sentence head's vectors, float32. Of documents that lie in blocks it holds a vector each, in their order.
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

    def split(self, blocks: Blocks) -> "list[Taps]":
        """The taps of each block, as if it had been computed alone: of the fields that have a value a token."""
        q, k, v = (blocks.split(side, 2) for side in (self.q, self.k, self.v))
        hidden = [None] * len(blocks) if self.hidden is None else blocks.split(self.hidden, 1)
        earlier = [taps.split(blocks) for taps in self.earlier]
        parts = zip(q, k, v, blocks.squares(self.bias), hidden, strict=True)
        return [Taps(*part, earlier=tuple(own[i] for own in earlier)) for i, part in enumerate(parts)]

    def tensors(self, fields: Collection[str]) -> list[Tensor]:
        """The tensors of these fields, those of earlier layers included."""
        own = [value for name, value in self._asdict().items() if name in fields and value is not None]
        return own + [tensor for taps in self.earlier for tensor in taps.tensors(fields)]
