"""The source "megatron": documents of Megatron's `.bin`/`.idx` pairs. Options: source_tokenizer.

A document is the run of sequences between two document indices; end-of-document and padding tokens are dropped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.errors import DataError
from minilm.data.sources.indexed import Index, read_index
from minilm.data.sources.plugin import Document, Plan, take
from minilm.data.sources.vocabulary import Mapper, from_tokenizer, needs_tokenizer

UNIT_TOKENS = 1 << 22


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    [named] = take(options, "megatron", "source_tokenizer")
    if named is None:
        raise needs_tokenizer("megatron")
    mapping = from_tokenizer(named, tokenizer)
    indices = [read_index(given, "megatron") for given in inputs]
    if not indices:
        raise DataError("no .bin/.idx pair was given; name at least one prefix")
    units = [[n, *bounds] for n, index in enumerate(indices) for bounds in cut(document_bounds(index), index)]
    files = [index.prefix + ending for index in indices for ending in (".idx", ".bin")]
    spec = {"prefixes": [index.prefix for index in indices], "ids": mapping.ids, "names": mapping.names}
    return Plan(spec, units, files, [f"{index.prefix}: {mapping.note}" for index in indices])


def read(spec: Any, unit: Any) -> Iterator[Document]:
    file, first, last = unit
    index = read_index(spec["prefixes"][file], "megatron")
    return documents(
        index, document_bounds(index), file, first, last, Mapper(spec["ids"], spec["names"], index.prefix)
    )


def document_bounds(index: Index) -> np.ndarray:
    assert index.documents is not None
    return index.documents


def cut(bounds: np.ndarray, index: Index) -> list[list[int]]:
    """[first, last) document numbers of units of about UNIT_TOKENS tokens."""
    tokens_before = np.concatenate([[0], np.cumsum(index.lengths)])[bounds]
    units, first = [], 0
    while first < len(bounds) - 1:
        target = tokens_before[first] + UNIT_TOKENS
        last = max(first + 1, int(np.searchsorted(tokens_before, target, side="right")) - 1)
        units.append([first, last])
        first = last
    return units


def documents(
    index: Index, bounds: np.ndarray, file: int, first: int, last: int, mapper: Mapper
) -> Iterator[Document]:
    """Documents first … last - 1: the sequences between bounds, joined and mapped."""
    tokens = index.tokens()
    for number in range(first, last):
        sequences = range(int(bounds[number]), int(bounds[number + 1]))
        parts = [tokens[index.starts[s] : index.starts[s] + index.lengths[s]] for s in sequences]
        joined = np.concatenate(parts).astype(np.int64) + index.shift if parts else np.zeros(0, np.int64)
        yield Document(file, number, mapper(joined))
