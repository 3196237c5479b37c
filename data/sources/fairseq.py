"""The source "fairseq": documents of fairseq's memory-mapped `.bin`/`.idx` pairs. Options: dict, encoder.

A sequence ends with EOS. A sequence that is EOS alone separates documents; where there is none, every sequence is a
document. An EOS inside a sequence ends a document too. EOS and padding are dropped: packing puts SEP between documents.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.errors import DataError
from minilm.data.sources.indexed import Index, read_index, read_once
from minilm.data.sources.megatron import cut, documents
from minilm.data.sources.plugin import Document, Plan, take
from minilm.data.sources.vocabulary import Mapper, from_fairseq_dict

LAYOUT = "fairseq"
EOS = 2


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    return plan_layout(LAYOUT, inputs, tokenizer, options)


def read(spec: Any, unit: Any) -> Iterator[Document]:
    return read_layout(LAYOUT, spec, unit)


def plan_layout(layout: str, inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    dictionary, encoder = take(options, layout, "dict", "encoder")
    if dictionary is None:
        raise DataError(
            f"files of {layout} need fairseq's dict.txt to say what their ids mean; name it as `dict`"
        )
    mapping = from_fairseq_dict(Path(dictionary), tokenizer, Path(encoder) if encoder else None)
    indices, notes = read_once(inputs, layout)
    units = [[n, *bounds] for n, index in enumerate(indices) for bounds in cut(document_bounds(index), index)]
    files = [index.prefix + ending for index in indices for ending in (".idx", ".bin")]
    spec = {"prefixes": [index.prefix for index in indices], "ids": mapping.ids, "names": mapping.names}
    told = [f"{index.prefix}: {mapping.note}" for index in indices] + notes
    return Plan(spec, units, files, told, [index.prefix for index in indices])


def read_layout(layout: str, spec: Any, unit: Any) -> Iterator[Document]:
    file, first, last = unit
    index = read_index(spec["prefixes"][file], layout)
    mapper = Mapper(spec["ids"], spec["names"], index.prefix)
    return documents(index, document_bounds(index), file, first, last, mapper, sequences_end=True)


def document_bounds(index: Index) -> np.ndarray:
    """Bounds of documents in sequences: behind every sequence that is EOS alone, else behind every sequence."""
    single = np.flatnonzero(index.lengths == 1)
    with index.tokens() as tokens:
        stored = np.array([int(tokens.read(int(start), 1)[0]) for start in index.starts[single]], np.int64)
    separators = single[stored + index.shift == EOS]
    number = len(index.lengths)
    if not len(separators):
        return np.arange(number + 1)
    return np.unique(np.concatenate([[0], separators + 1, [number]]))
