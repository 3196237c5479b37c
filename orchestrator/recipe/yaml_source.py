"""A recipe's YAML as plain Python values, each with the place it came from.

Reads the YAML 1.2 core types rather than PyYAML's 1.1 ones, because the differences bite recipe
authors: `5e-4` is a number (1.1 reads a string), `on`, `yes` and `no` are words (1.1 reads booleans),
`1:30` is a word (1.1 reads 90). Python tags never construct anything; a duplicate key is refused, not
silently won by the last one; aliases and merge keys (`<<`) work but can't explode. Leaves out what the values mean.

Invariant: every path in `values` has a place, so that any later error can name file and line.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minilm.orchestrator.errors import RecipeErrors
from minilm.orchestrator.recipe.yaml_problems import told

KeyPath = tuple[str | int, ...]

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 20_000  # after aliases are followed: a "billion laughs" file stops here
OVERRIDE = "--set"  # the place of a value that came from the command line
ENVIRONMENT = "environment"  # … and of a variable's

_PREFIX = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class _Malformed(Exception):
    """A problem in the YAML itself, at a line of the file (0-based) and a path."""

    def __init__(self, line: int, path: KeyPath, text: str) -> None:
        super().__init__(text)
        self.line, self.path, self.text = line, path, text


@dataclass(frozen=True)
class Expanded:
    """A text that held variables: as written, where its beginning comes from, and the names that the environment gave.

    place: "FILE:LINE" or "--set" of the variable's value, or `ENVIRONMENT`; of a text that begins otherwise its own.
    """

    written: str
    place: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The values of a recipe: of one file, or of several that extend each other, after overrides.

    `files`: the given one first. `values`: dicts, lists, str, int, float, bool, None. `places`: key path → "FILE:LINE"
    or "--set". `expanded`: the values that held variables. `stages`: the number in the file of each stage of `values`,
    where there are more of them (`assistant`), and `notes` why, by their place in `values`.
    """

    files: tuple[str, ...]
    values: Any
    places: dict[KeyPath, str] = field(repr=False)
    expanded: dict[KeyPath, Expanded] = field(default_factory=dict, repr=False)
    stages: tuple[int, ...] = ()
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.files[0]

    def place(self, path: KeyPath) -> str:
        """Where the value at `path` was written, or the nearest value around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.file)

    def counts_from(self, path: KeyPath) -> Path | None:
        """The folder that a relative path at `path` counts from: of the file that it stands in.

        None: the current one, of what the command line or the environment gave.
        """
        inside = path
        while inside and inside not in self.expanded and inside not in self.places:
            inside = inside[:-1]
        place = self.expanded[inside].place if inside in self.expanded else self.place(path)
        return None if place in (OVERRIDE, ENVIRONMENT) else Path(place.rpartition(":")[0] or place).parent

    def problem(self, path: KeyPath, text: str) -> str:
        """One line: place, path as `--set` would take it, text."""
        shown = path
        if self.stages and path[:1] == ("stages",) and len(path) > 1:
            shown = ("stages", self.stages[int(path[1])], *path[2:])
        dotted = ".".join(str(key) for key in shown)
        return f"{self.place(path)}: {dotted}: {text}" if dotted else f"{self.place(path)}: {text}"


def read_file(file: Path, text: str | None = None) -> Source:
    """The values of one file. text: what it would hold; it need not be there then. Raises RecipeErrors."""
    try:
        raw = file.read_bytes() if text is None else text.encode()
    except OSError as error:
        raise RecipeErrors([f"{file}: can't read the recipe: {error.strerror}"]) from None
    if len(raw) > MAX_FILE_BYTES:
        raise RecipeErrors([f"{file}: given {len(raw)} bytes; allowed: a recipe of at most {MAX_FILE_BYTES}"])
    try:
        values, lines = _parse(_text(raw))
    except _Malformed as error:
        dotted = ".".join(map(str, error.path))
        where = f"{file}:{error.line + 1}"
        raise RecipeErrors(
            [f"{where}: {dotted}: {error.text}" if dotted else f"{where}: {error.text}"]
        ) from None
    return Source((str(file),), values, {path: f"{file}:{line + 1}" for path, line in lines.items()})


def override(source: Source, overrides: Sequence[str]) -> None:
    """Applies `overrides` (each `path=value`) in order and in place. Raises RecipeErrors."""
    problems = [text for change in overrides if (text := _apply(source, change)) is not None]
    if problems:
        raise RecipeErrors(problems)


def _text(raw: bytes) -> str:
    """The file's text: UTF-8, or UTF-16 that says so by its first two bytes."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n")
        what = f"given the byte 0x{raw[error.start]:02x}, which is not UTF-8 here; save the file as UTF-8"
        raise _Malformed(line, (), what) from None


def _parse(text: str) -> tuple[Any, dict[KeyPath, int]]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line, what = told(error)
        if "${" in "".join(text.splitlines()[line : line + 1]):
            what += '; within { } and [ ] a variable stands in quotes, as "${NAME}"'
        raise _Malformed(line, (), what) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        what = (
            f"given the character U+{ord(text[error.position]):04X}, which no YAML file may hold; remove it"
        )
        raise _Malformed(line, (), what) from None
    except RecursionError:
        raise _Malformed(0, (), "nested too deeply to be a recipe") from None
    lines: dict[KeyPath, int] = {}
    return (None if root is None else _construct(root, (), lines)), lines


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """The value of `node`; notes the line of every path in `lines` (a key's line, where there is a key)."""
    line = node.start_mark.line
    lines.setdefault(path, line)
    if len(lines) > MAX_VALUES or len(path) > 20:
        raise _Malformed(line, (), f"more than {MAX_VALUES} values or 20 levels (aliases count each time)")
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return [_construct(item, (*path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        _merge(node, path)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            key_line = key_node.start_mark.line
            if not isinstance(key, str) or key == "":
                raise _Malformed(key_line, path, "given a key that is not a word; allowed: KEY: VALUE")
            if key in mapping:
                first = lines[*path, key] + 1
                raise _Malformed(key_line, (*path, key), f"given twice (first on line {first}); keep one")
            lines[*path, key] = key_line
            mapping[key] = _construct(value_node, (*path, key), lines)
        return mapping
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    raise _Malformed(line, path, f"given the YAML tag {node.tag!r}; allowed: plain values")


def _merge(node: yaml.MappingNode, path: KeyPath, level: int = 0) -> None:
    """Resolves `<<: *NAME` and `<<: [*NAME, …]` in place: keys that the mapping lacks, those of the first name winning.

    What is merged keeps the line where it was written.
    """
    merges = [(key_node, value) for key_node, value in node.value if key_node.tag == _PREFIX + "merge"]
    node.value = [
        pair for pair in node.value if pair not in merges
    ]  # so that one that merges itself ends here
    for key_node, value in merges:
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if len(merges) > 1:
            what = "given twice; keep one, with a list: <<: [*ONE, *TWO]"
        elif not sources or not all(isinstance(source, yaml.MappingNode) for source in sources):
            what = "given no mapping; allowed: <<: *NAME or <<: [*NAME, …] of mappings that are marked &NAME above"
        elif level == 20:
            what = "given merge keys within merge keys over more than 20 levels"
        else:
            for source in {id(source): source for source in sources}.values():
                _merge(source, path, level + 1)
                present = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
                node.value += [
                    (key, value)
                    for key, value in source.value
                    if not (isinstance(key, yaml.ScalarNode) and key.value in present)
                ]
            continue
        raise _Malformed(key_node.start_mark.line, (*path, "<<"), what)


def _scalar(node: yaml.ScalarNode, path: KeyPath) -> str | int | float | bool | None:
    text: str = node.value
    if node.style in ("'", '"', "|", ">") and node.tag == _PREFIX + "str":
        return text
    if node.tag not in {
        _PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
    }:
        raise _Malformed(
            node.start_mark.line, path, f"given the YAML tag {node.tag!r}; allowed: plain values"
        )
    return plain_value(text)


def plain_value(text: str) -> str | int | float | bool | None:
    """What a text without quotes means."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", "")) if len(text) < 40 else text
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return text


def _apply(source: Source, override: str) -> str | None:
    """Puts one `path=value` into `source` in place. Returns the problem with it, or None."""
    dotted, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in dotted.split(".")):
        return f"{OVERRIDE} {override}: given no path and value; allowed: PATH=VALUE, as stages.0.steps=100"
    try:
        value, lines = _parse(text)
    except _Malformed as error:
        return f"{OVERRIDE} {override}: {error.text}; put quotes around a value with : or # in it"
    parent: Any = source.values
    path: KeyPath = ()
    *inner, last = (part.strip() for part in dotted.split("."))
    for part in inner:
        key = _child(parent, part)
        if key is None:
            return f"{OVERRIDE} {override}: {_no_such(parent, part, path)}"
        if isinstance(parent, dict):
            parent.setdefault(key, {})
        parent, path = parent[key], (*path, key)
    key = _child(parent, last)
    if key is None:
        return f"{OVERRIDE} {override}: {_no_such(parent, last, path)}"
    parent[key] = value
    target = (*path, key)
    for old in [place for place in source.places if place[: len(target)] == target]:
        del source.places[old]
    source.places.update({(*target, *below): OVERRIDE for below in lines} | {target: OVERRIDE})
    return None


def _child(parent: Any, part: str) -> Any:
    """The key of `part` in a mapping, or the index in a list (by number, or by the item's name)."""
    if isinstance(parent, dict):
        return part
    if isinstance(parent, list):
        if part.isdecimal():
            return int(part) if int(part) < len(parent) else None
        named = [i for i, item in enumerate(parent) if isinstance(item, dict) and item.get("name") == part]
        return named[0] if len(named) == 1 else None
    return None


def _no_such(parent: Any, part: str, path: KeyPath) -> str:
    above = ".".join(map(str, path)) or "the recipe"
    if not isinstance(parent, list):
        return f"{above} holds a single value, so it has no {part!r}"
    names = [str(item["name"]) for item in parent if isinstance(item, dict) and "name" in item]
    numbers = f"0 to {len(parent) - 1}" if parent else "nothing, the list is empty"
    return f"given {part!r}; allowed in {above}: {', '.join([numbers, *names])}"
