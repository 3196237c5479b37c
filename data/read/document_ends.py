"""Where documents end in a stream of tokens that is read in place, so that no two are glued together.

Most streams hold an end-of-document id after every document; then every end that is read is checked for it. Others
hold none, and only the index knows: then one is put in, in closed form, when rows are read. A stream that has some and
lacks others is refused.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.sources.indexed import Index

_SAMPLES = 1024
Integers = npt.NDArray[np.int64]


class Places(NamedTuple):
    """Tokens of rows: `tokens` [rows, content] are places in the stream; where `inserted` (bool, same shape) an end of
    document stands instead."""

    tokens: Integers
    inserted: npt.NDArray[np.bool_]


class DocumentEnds:
    """`ends` (ascending): the places after the last token of each document. `is_end(places)` tells whether tokens are
    end-of-document ids (bool)."""

    def __init__(self, index: Index, is_end: Callable[[Integers], npt.NDArray[np.bool_]]):
        before = np.concatenate([[0], np.cumsum(index.lengths)])
        if (index.starts != before[:-1]).any():
            raise DataError(
                f"the sequences of {index.prefix + '.idx'!r} do not lie one after another in its .bin, so it can't be "
                "read in place; import it with `minilm data import`"
            )
        bounds = before if index.documents is None else before[index.documents]
        self._ends, self._prefix = np.unique(bounds[bounds > 0]), index.prefix
        num_tokens = int(before[-1])
        count = min(_SAMPLES, len(self._ends))
        sample = (
            self._ends[np.linspace(0, len(self._ends) - 1, count).astype(np.int64)] if count else self._ends
        )
        ended = is_end(sample - 1)
        if ended.any() and not ended.all():
            raise self._mixed(int(sample[~ended][0]))
        self.inserts = bool(count) and not ended.any()
        self._inserted = self._ends + np.arange(len(self._ends)) if self.inserts else self._ends[:0]
        self.num_tokens = num_tokens + len(self._inserted)

    def places(self, rows: Integers, content: int) -> Places:
        """What stands in `rows` [n], each of `content` tokens of the stream with its inserted ends."""
        wanted = rows[:, None] * content + np.arange(content)
        if not self.inserts:
            return Places(wanted, np.zeros(wanted.shape, dtype=bool))
        earlier = np.searchsorted(self._inserted, wanted)
        inserted = self._inserted[np.minimum(earlier, len(self._inserted) - 1)] == wanted
        return Places(
            wanted - earlier - inserted, inserted
        )  # an inserted end: the place of the token before it

    def check(self, rows: Integers, content: int, kept: npt.NDArray[np.bool_]) -> None:
        """DataError where a document ends in these rows without an end-of-document id. `kept` [n, content]: tokens
        that are none."""
        if self.inserts:
            return
        first = np.searchsorted(self._ends, rows * content, side="right")
        counts = np.searchsorted(self._ends, (rows + 1) * content, side="right") - first
        row = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + first[row]
        wrong = kept[row, self._ends[number] - 1 - rows[row] * content]
        if wrong.any():
            raise self._mixed(int(self._ends[number][wrong][0]))

    def _mixed(self, end: int) -> DataError:
        return DataError(
            f"{self._prefix + '.bin'!r}: the document that ends before token {end} has no end-of-document id, and "
            "others have; read in place it would be glued to the next one: import it with `minilm data import`"
        )
