"""The order of rows as a closed form: run position g -> row of the data set, with no table and no state.

Epoch e = g // n reads every one of the n rows once, in an order keyed by (seed, e). The permutation is a
Feistel network over Z_a x Z_b with a·b >= n and a ~ b ~ sqrt(n): an index is split into (l, r) = divmod(x,
b), the two halves are added to hashes of each other (modulo a and b), and results that fall outside [0, n)
walk the cycle until they come back inside. a·b - n < a, so a walk is almost always zero steps long;
power-of-two halves would walk up to four times as far.

The arithmetic is on unsigned 64-bit integers and uses no random generator of numpy or torch, so the order cannot change
with their versions. Golden vectors and a pure-integer twin in the tests keep it frozen for ever. Left out: reading
shards; this module knows numbers only.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError

U64 = npt.NDArray[np.uint64]

NUM_ROUNDS = 8  # each changes one half; measured against a uniform shuffle in the tests
MAX_ROWS = 1 << 62

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the increment of splitmix64
_MASK = (1 << 64) - 1


def mix(x: U64) -> U64:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014), elementwise: a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive(key: int, *parts: int) -> int:
    """A new 64-bit key from `key` and a path of integers: independent keys for epochs, windows, corpora."""
    for part in parts:
        key = _mix_int((_mix_int((key + _GOLDEN) & _MASK) ^ (part & _MASK)) + _GOLDEN & _MASK)
    return key


def _derive_last(key: int, parts: U64) -> U64:
    """`derive(key, part)` for an array of parts."""
    first = np.uint64(_mix_int((key + _GOLDEN) & _MASK))
    return mix((first ^ parts) + np.uint64(_GOLDEN))


def halves(n: int) -> tuple[int, int]:
    """(a, b) with a·b >= n, a·b - n < a and a ~ b ~ sqrt(n)."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    return a, -(-n // a)


def permute(x: U64, keys: U64, n: int) -> U64:
    """The images of the indices `x` (uint64, all < n) under the permutations of [0, n) keyed by `keys` (same shape)."""
    return _walk(x, keys, n, forward=True)


def unpermute(y: U64, keys: U64, n: int) -> U64:
    """The inverse of `permute`."""
    return _walk(y, keys, n, forward=False)


def _walk(x: U64, keys: U64, n: int, *, forward: bool) -> U64:
    one_pass = _rounds if forward else _rounds_backwards
    out = one_pass(x, keys, n)
    outside = np.flatnonzero(out >= np.uint64(n))
    while outside.size:
        out[outside] = one_pass(out[outside], keys[outside], n)
        outside = outside[out[outside] >= np.uint64(n)]
    return out


def _round_key(keys: U64, number: int) -> U64:
    return keys + np.uint64((number + 1) * _GOLDEN & _MASK)


def _rounds(x: U64, keys: U64, n: int) -> U64:
    a, b = (np.uint64(v) for v in halves(n))
    left, right = x // b, x % b
    for number in range(0, NUM_ROUNDS, 2):
        left = (left + mix(_round_key(keys, number) ^ mix(right)) % a) % a
        right = (right + mix(_round_key(keys, number + 1) ^ mix(left)) % b) % b
    return left * b + right


def _rounds_backwards(y: U64, keys: U64, n: int) -> U64:
    a, b = (np.uint64(v) for v in halves(n))
    left, right = y // b, y % b
    for number in range(NUM_ROUNDS - 2, -1, -2):
        right = (right + b - mix(_round_key(keys, number + 1) ^ mix(left)) % b) % b
        left = (left + a - mix(_round_key(keys, number) ^ mix(right)) % a) % a
    return left * b + right


class Order(NamedTuple):
    """The full shuffle of `num_rows` rows under `seed`; everything it needs is in these two integers."""

    num_rows: int
    seed: int

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """int64 [count]: the data set's row numbers at run positions first, first + 1, …"""
        return self.at(np.arange(first, first + count, dtype=np.int64))

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [n]: the data set's row numbers at these run positions."""
        epochs, within = np.divmod(positions.astype(np.uint64), np.uint64(self.num_rows))
        keys = _derive_last(derive(self.seed, 0), epochs)
        return permute(within, keys, self.num_rows).astype(np.int64)

    def position(self, row: int, epoch: int) -> int:
        """The run position at which `epoch` (0, 1, …) reads `row`: the inverse of `rows`."""
        keys = _derive_last(derive(self.seed, 0), np.array([epoch], dtype=np.uint64))
        within = unpermute(np.array([row], dtype=np.uint64), keys, self.num_rows)
        return epoch * self.num_rows + int(within[0])


def make_order(num_rows: int, seed: int) -> Order:
    """A checked `Order`. DataError if there is nothing to order, or a number is out of range."""
    if not 1 <= num_rows <= MAX_ROWS:
        raise DataError(f"a data set of {num_rows} rows cannot be read in order; allowed: 1 to 2^62 rows")
    if not 0 <= seed <= _MASK:
        raise DataError(f"seed {seed} is outside 0 … 2^64 - 1; give a seed in that range")
    return Order(num_rows, seed)
