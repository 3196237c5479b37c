"""Where documents come from: the interface of a source, and how sources are found.

A source is an object (a module will do) with two functions:

    plan(inputs, tokenizer, options) -> Plan     once, in the caller's process: look at the inputs, refuse bad ones
    read(spec, unit) -> iterator of Item         in many processes: the documents of one unit, in a fixed order

`spec` and every unit are plain JSON. A document is text, or token ids of the data set's own vocabulary (uint32). Its
(file, position) must not depend on how units are cut: it decides the shuffle. A record that gives no document is
yielded too, as `accounts.LeftOut`, so that the books balance; `accounts.Noticed` tells of what was put right.
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
from minilm.data.sources.accounts import LeftOut, Noticed

GROUP = "minilm.sources"
BUILT_IN = {
    "text": "minilm.data.sources.text",
    "megatron": "minilm.data.sources.megatron",
    "fairseq": "minilm.data.sources.fairseq",
    "fairseq-legacy": "minilm.data.sources.fairseq_legacy",
    "webdataset": "minilm.data.sources.web",
}


READER_VERSION = 2
"""Of the rules by which the built-in sources read: a data set built under other rules is not taken for the same."""


class Document(NamedTuple):
    """One document; an empty one is counted, not used. A long text may come in pieces one behind the other, of one file
    and position: `continues` says that this one belongs to the document before. `place` is for messages."""

    file: int
    position: int
    content: str | npt.NDArray[np.uint32]
    continues: bool = False
    place: str = ""


Item = Document | LeftOut | Noticed


class Plan(NamedTuple):
    """`files`: every file that is read (their content identifies the build); `notes`: one line each for the report;
    `names`: what the file numbers of documents are called in the accounts, where that is not `files`; `left_out`:
    (path, reason) of what was met in folders and is not read."""

    spec: Any
    units: list[Any]
    files: list[str]
    notes: list[str]
    names: list[str] | None = None
    left_out: Sequence[tuple[str, str]] = ()


class Source(Protocol):
    def plan(self, inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan: ...

    def read(self, spec: Any, unit: Any) -> Iterator[Item]: ...


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
