"""The source "megatron": documents of Megatron's `.bin`/`.idx` pairs. Options: source_tokenizer.

A document is the run of sequences between two document indices, cut after every end-of-document id (the tokenizer's
SEP and EOS) inside it. Those ids and padding are dropped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.sources.indexed import Index, read_index, read_once
from minilm.data.sources.plugin import Document, Plan, take
from minilm.data.sources.vocabulary import DROPPED, END, Mapper, from_tokenizer, needs_tokenizer

UNIT_TOKENS = 1 << 22


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    [named] = take(options, "megatron", "source_tokenizer")
    if named is None:
        raise needs_tokenizer("megatron")
    mapping = from_tokenizer(named, tokenizer)
    indices, notes = read_once(inputs, "megatron")
    units = [[n, *bounds] for n, index in enumerate(indices) for bounds in cut(document_bounds(index), index)]
    files = [index.prefix + ending for index in indices for ending in (".idx", ".bin")]
    spec = {"prefixes": [index.prefix for index in indices], "ids": mapping.ids, "names": mapping.names}
    told = [f"{index.prefix}: {mapping.note}" for index in indices] + notes
    return Plan(spec, units, files, told, [index.prefix for index in indices])


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
    index: Index,
    bounds: np.ndarray,
    file: int,
    first: int,
    last: int,
    mapper: Mapper,
    *,
    sequences_end: bool = False,
) -> Iterator[Document]:
    """Documents first … last - 1: the sequences between bounds, joined, mapped, and cut after every END.

    `sequences_end`: an END that is a sequence's last token ends the sequence alone (fairseq's). The first piece of a
    document has its number as position, every further one 2^63 + the number of tokens before it.
    """
    before = np.concatenate([[0], np.cumsum(index.lengths)])
    with index.tokens() as tokens:
        for number in range(first, last):
            begin, end = int(bounds[number]), int(bounds[number + 1])
            parts = []
            for sequence in range(begin, end):
                stored = tokens.read(int(index.starts[sequence]), int(index.lengths[sequence]))
                parts.append(mapper.map_all(stored.astype(np.int64) + index.shift))
                if sequences_end and len(stored) and parts[-1][-1] == END:
                    parts[-1][-1] = DROPPED
            joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
            cuts = np.concatenate([[0], np.flatnonzero(joined == END) + 1])
            pieces = [piece[piece >= 0].astype(np.uint32) for piece in np.split(joined, cuts[1:])]
            found = [(int(cut), piece) for cut, piece in zip(cuts, pieces, strict=True) if len(piece)]
            yield Document(file, number, found[0][1] if found else np.zeros(0, np.uint32))
            for cut, piece in found[1:]:
                yield Document(file, (1 << 63) + int(before[begin]) + cut, piece)
