"""A recipe with every value that it has, defaults included, and where each comes from; it loads again as a recipe.

    values(recipe, source)     every value by its path
    as_yaml(recipe, source)    the recipe written out, a comment behind every value

The text has the same digest as the recipe where it lies in the first file's folder, from which its paths count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from minilm.orchestrator.recipe.load import as_the_file_has_it
from minilm.orchestrator.recipe.schema import BUILT_WITH, Data, Recipe
from minilm.orchestrator.recipe.yaml_source import KeyPath, Source, plain_value

COLUMN = 44  # where comments begin, if there is room
_PLAIN = re.compile(r"[A-Za-z_./~](?:[\w./~@:+*-]*[\w./~@+*-])?")


_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")  # in YAML, though JSON has them


@dataclass(frozen=True)
class Shown:
    """A value by its path, as JSON has it, with local paths as the first file would write them.

    origin: "FILE:LINE", "--set" or "default"; with what a variable or a default stands for behind it.
    """

    path: KeyPath
    value: Any
    origin: str


def values(recipe: Recipe, source: Source) -> list[Shown]:
    """Every value in the order of the types; mappings and lists of mappings are told by what is in them."""
    return list(_values(recipe, (), source))


def as_yaml(recipe: Recipe, source: Source, *head: str) -> str:
    """head: lines of the comment at the top."""
    lines = [f"# {line}" for line in head]
    within: KeyPath = ()
    for shown in values(recipe, source):
        for depth in range(len(shown.path) - 1):
            if shown.path[: depth + 1] != within[: depth + 1]:
                lines += _heading(shown.path[: depth + 1], source)
        within = shown.path[:-1]
        text = f"{_indent(shown.path)}{shown.path[-1]}: {scalar(shown.value)}"
        lines.append(f"{text:<{COLUMN}}  # {shown.origin}")
    return "\n".join(_with_dashes(lines)) + "\n"


def whole_text(recipe: Recipe, source: Source, digest: str) -> str:
    """The recipe written out, with its files and its digest at the top."""
    head = (
        f"{' over '.join(source.files)}, with every default; relative paths count from {Path(source.file).parent}/",
        f"digest {digest}",
    )
    return as_yaml(recipe, source, *head)


def _values(section: BaseModel, path: KeyPath, source: Source) -> Iterator[Shown]:
    left_out = _not_to_be_written(section) if isinstance(section, Data) else ()
    written = getattr(section, "_as_written", {})
    for key, field in type(section).model_fields.items():
        value, at = getattr(section, key), (*path, key)
        if key in left_out:
            continue
        if isinstance(value, BaseModel):
            yield from _values(value, at, source)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for i, item in enumerate(value):
                yield from _values(item, (*at, i), source)
        else:
            plain = section.model_dump(mode="json", include={key})[key]
            if isinstance(plain, list):
                plain = [written.get(item, item) if isinstance(item, str) else item for item in plain]
            elif isinstance(plain, str):
                plain = written.get(plain, plain)
            yield Shown(at, plain, _origin(at, field.description or "", source))


def _not_to_be_written(data: Data) -> set[str]:
    """Keys that a data section with data sets may not have: their defaults would be refused."""
    if data.text is not None:
        return {"corpora"}
    of_tokens = {"tokenizer", "seq_len", "held_out"} if any(c.tokens for c in data.corpora or ()) else set()
    return set(BUILT_WITH) - of_tokens


def _origin(path: KeyPath, description: str, source: Source) -> str:
    written = as_the_file_has_it(source, path)
    if written not in source.places:
        _, mark, meaning = " ".join(description.split()).partition("default: ")
        return f"default: {meaning.partition('. ')[0].rstrip('.')}" if mark else "default"
    if written not in source.expanded:
        return source.places[written]
    found = source.expanded[written]
    names = ", ".join(f"${name}" for name in dict.fromkeys(found.names))
    whence = f"environment {names}" if names else found.place
    return f"{source.places[written]}, {' '.join(found.written.split())} from {whence}"


def _heading(path: KeyPath, source: Source) -> list[str]:
    if isinstance(path[-1], int):
        note = source.notes.get(path[-1]) if path[0] == "stages" and len(path) == 2 else None
        return [f"{_indent(path)}# {note}"] * bool(note) + [f"{_indent(path)}-"]
    return [*[""] * (len(path) == 1), f"{_indent(path)}{path[-1]}:"]


def _indent(path: KeyPath) -> str:
    return "  " * (len(path) - 1)


def _with_dashes(lines: list[str]) -> Iterator[str]:
    """Each dash on the line of the first key of its item."""
    dash = ""
    for line in lines:
        if line.strip() == "-":
            dash = line
        elif dash:
            yield dash + line[len(dash) :]
            dash = ""
        else:
            yield line


def scalar(value: Any) -> str:
    """A plain value, or a list of such, as YAML that reads back as it."""
    if isinstance(value, list):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and plain_value(value) == value:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
