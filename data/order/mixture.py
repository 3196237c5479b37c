"""Several corpora mixed by weights: which corpus run position g reads, and how often that corpus was read before.

A period of 16,384 positions holds corpus c exactly w_c times (weights are rounded to that grid, largest
remainders first), spread as evenly as integers allow: the j-th occurrence of c has the time (2j + 1) / (2 w_c), and the
times of all corpora are sorted. So every corpus has a counter of its own, a closed form of g, and its own epochs:
changing one weight never changes the order inside another corpus. The arithmetic is on integers only, as in
order.permutation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError

PERIOD = 1 << 14
_TICKS = 1 << 40


class Schedule(NamedTuple):
    """One period. `counts[c]` is the number of positions of corpus c; `corpus[i]` is the corpus of position i, and
    `before[i]` the number of earlier positions of that corpus."""

    counts: npt.NDArray[np.int64]
    corpus: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]

    def at(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The corpus [n] at these run positions [n], and that corpus's own counter [n]."""
        periods, within = np.divmod(positions, PERIOD)
        corpus = self.corpus[within]
        return corpus, periods * self.counts[corpus] + self.before[within]

    def position(self, corpus: int, counter: int) -> int:
        """The run position at which `corpus` is read for the (counter + 1)-th time: the inverse of `at`."""
        period, before = divmod(counter, int(self.counts[corpus]))
        within = np.flatnonzero(self.corpus == corpus)[before]
        return period * PERIOD + int(within)


def make_schedule(weights: Sequence[float]) -> Schedule:
    """The schedule of corpora with these weights. DataError if a weight is not positive, or too small for the
    grid."""
    for number, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise DataError(f"weight {weight} of corpus {number + 1} is not positive; give a number above 0")
    counts = _counts(weights)
    if (counts == 0).any():
        number = int(np.flatnonzero(counts == 0)[0])
        raise DataError(
            f"weight {weights[number]} of corpus {number + 1} is less than 1/{PERIOD} of all; "
            "raise it or leave the corpus out"
        )
    corpus = np.repeat(np.arange(len(counts)), counts)
    occurrence = np.concatenate([np.arange(n) for n in counts])
    ticks = (2 * occurrence + 1) * _TICKS // counts[corpus]
    order = np.lexsort((corpus, ticks))
    return Schedule(counts, corpus[order], occurrence[order])


def _counts(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """The weights on the grid of a period: rounded down, then the largest remainders get one more."""
    exact = [weight.as_integer_ratio() for weight in map(float, weights)]
    common = max(denominator for _, denominator in exact)  # denominators of floats are powers of two
    parts = [numerator * (common // denominator) for numerator, denominator in exact]
    floors = [part * PERIOD // sum(parts) for part in parts]
    remainders = [part * PERIOD % sum(parts) for part in parts]
    first = sorted(range(len(parts)), key=lambda c: (-remainders[c], c))
    for c in first[: PERIOD - sum(floors)]:
        floors[c] += 1
    return np.array(floors, dtype=np.int64)
