"""The source "fairseq-legacy": as "fairseq", for the older TNTIDX files. Options: dict, encoder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilm.data.sources.fairseq import plan_layout, read_layout
from minilm.data.sources.plugin import Document, Plan

LAYOUT = "fairseq-legacy"


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    return plan_layout(LAYOUT, inputs, tokenizer, options)


def read(spec: Any, unit: Any) -> Iterator[Document]:
    return read_layout(LAYOUT, spec, unit)
