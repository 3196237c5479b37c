"""Where documents come from: the interface of a source, and how sources are found.

A source is an object (a module will do) with two functions:

    plan(inputs, tokenizer, options) -> Plan     once, in the caller's process: look at the inputs, refuse bad ones
    read(spec, unit) -> iterator of Document     in many processes: the documents of one unit, in a fixed order

`spec` and every unit are plain JSON. A document is text, or token ids of the data set's own vocabulary (uint32). Its
(file, position) must not depend on how units are cut: it decides the shuffle.
Other distributions add sources by an entry point of the group `minilm.sources`: name = "package.module" or
"package.module:object". Left out: pickles, shell commands, anything that is not JSON between processes.
"""

import importlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError

GROUP = "minilm.sources"
BUILT_IN = {
    "text": "minilm.data.sources.text",
    "megatron": "minilm.data.sources.megatron",
    "fairseq": "minilm.data.sources.fairseq",
    "fairseq-legacy": "minilm.data.sources.fairseq_legacy",
    "webdataset": "minilm.data.sources.web",
}


class Document(NamedTuple):
    """One document; an empty one is counted, not used."""

    file: int
    position: int
    content: str | npt.NDArray[np.uint32]


class Plan(NamedTuple):
    """`files`: every file that is read (their content identifies the build); `notes`: one line each for the report;
    `left_out`: (path, reason) of what was met in folders and is not read."""

    spec: Any
    units: list[Any]
    files: list[str]
    notes: list[str]
    left_out: Sequence[tuple[str, str]] = ()


class Source(Protocol):
    def plan(self, inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan: ...

    def read(self, spec: Any, unit: Any) -> Iterator[Document]: ...


@lru_cache(maxsize=32)
def find_source(name: str) -> Source:
    """The source of this name. DataError names those that there are."""
    if name in BUILT_IN:
        return cast(Source, importlib.import_module(BUILT_IN[name]))
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name not in plugins:
        raise DataError(
            f"source {name!r} is not known; there are: {', '.join(sorted({*BUILT_IN, *plugins}))}"
        )
    found = plugins[name].load()
    if not (callable(getattr(found, "plan", None)) and callable(getattr(found, "read", None))):
        raise DataError(
            f"source {name!r} ({plugins[name].value}) lacks plan() or read(); see data/sources/plugin.py"
        )
    return cast(Source, found)


def take(options: dict[str, Any], source: str, *allowed: str) -> list[Any]:
    """The values of the allowed options, in order, None where not given. DataError for any other option."""
    unknown = sorted(name for name, value in options.items() if value is not None and name not in allowed)
    if unknown:
        raise DataError(
            f"source {source!r} has no option {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed) or 'none'}"
        )
    return [options.get(name) for name in allowed]
