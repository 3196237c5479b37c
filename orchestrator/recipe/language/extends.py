"""`extends: FILE`: a recipe over another one, which may extend a third.

    extends: base.yaml            # counts from this file's folder; or package:IMPORT_NAME/FILE
    stages:
      - name: student             # the base's stage of that name, with these keys changed
        steps: 1000

Sections are merged key by key; stages and students by name, new ones standing before the next one in the list that
the base has, else last. Every other list is replaced, and so is `data` by one of another kind. `KEY: null` takes the
base's key away. Every value keeps the file and line where it stands.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.recipe.references import VARIABLE, expanded, package_path
from minilm.orchestrator.recipe.yaml_source import KeyPath, Source, read_file

MAX_FILES = 20
DATA_KINDS = ({"text"}, {"shards", "tokens", "corpora"})


@dataclass
class _Node:
    """A value with its place; within mappings and lists there are nodes again."""

    place: str
    value: Any


def read_chain(file: Path, text: str | None = None) -> Source:
    """`file` merged over what it extends. text: as for `read_file`. Raises RecipeErrors."""
    sources: list[Source] = []
    seen: list[Path] = []
    following: Path | None = file
    while following is not None:
        source = read_file(following, text if following is file else None)
        if not isinstance(source.values, dict):
            what = "the file is empty" if source.values is None else "the file is not a mapping"
            raise RecipeErrors([f"{source.file}:1: {what}; allowed: a recipe with name, data and stages"])
        sources.append(source)
        seen.append(following.resolve())
        following = _base(source, seen)
    merged = _node(sources[-1])
    for source in reversed(sources[:-1]):
        merged = _merged(merged, _node(source), ())
    places: dict[KeyPath, str] = {}
    values = _plain(merged, (), places)
    return Source(tuple(source.file for source in sources), values, places)


def _base(source: Source, seen: list[Path]) -> Path | None:
    """The file that `source` extends, whose key is taken out of the values."""
    if (given := source.values.pop("extends", None)) is None:
        return None

    def refuse(text: str) -> RecipeErrors:
        return RecipeErrors([source.problem(("extends",), f"given {given!r}{text}")])

    if not isinstance(given, str) or not given or VARIABLE.search(given):
        raise refuse("; allowed: the path of one recipe file, without variables, as extends: base.yaml")
    if given.startswith("package:"):
        try:
            path = package_path(given)
        except UserError as error:
            raise RecipeErrors([source.problem(("extends",), str(error))]) from None
    else:
        path = Path(source.file).parent / expanded(given)
    if not path.is_file():
        names = [
            other.name
            for other in path.parent.glob("*.yaml")
            if other.is_file() and other.resolve() not in seen
        ]
        close = difflib.get_close_matches(path.name, names, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else "; paths count from this file's folder"
        raise refuse(f", but there is no file {path}{guess}")
    if path.resolve() in seen:
        circle = [*seen[seen.index(path.resolve()) :], path.resolve()]
        named = " → ".join(one.name for one in circle)
        raise refuse(f", and so a circle: {named}; allowed in one of these files: no extends")
    if len(seen) == MAX_FILES:
        raise refuse(f"; allowed: at most {MAX_FILES} files that extend each other")
    return path


def _node(source: Source, path: KeyPath = ()) -> _Node:
    value = source.values
    for key in path:
        value = value[key]
    if isinstance(value, dict):
        value = {key: _node(source, (*path, key)) for key in value}
    elif isinstance(value, list):
        value = [_node(source, (*path, i)) for i in range(len(value))]
    return _Node(source.place(path), value)


def _plain(node: _Node, path: KeyPath, places: dict[KeyPath, str]) -> Any:
    places[path] = node.place
    if isinstance(node.value, dict):
        return {key: _plain(inner, (*path, key), places) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(inner, (*path, i), places) for i, inner in enumerate(node.value)]
    return node.value


def _merged(base: _Node, over: _Node, path: KeyPath) -> _Node:
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        if path == ("data",) and _kinds(base) and _kinds(over) and _kinds(base) != _kinds(over):
            return over
        if path[:1] == ("stages",) and len(path) == 2:
            _as_lists(base.value, over.value)
        merged = dict(base.value)
        for key, node in over.value.items():
            if key in merged and node.value is None:
                del merged[key]
            else:
                merged[key] = _merged(merged[key], node, (*path, key)) if key in merged else node
        return _Node(over.place, merged)
    if isinstance(base.value, list) and isinstance(over.value, list) and path[-1] in ("stages", "students"):
        return _Node(over.place, _merged_by_name(base.value, over.value, path))
    return over


def _merged_by_name(base: list[_Node], over: list[_Node], path: KeyPath) -> list[_Node]:
    merged, new = list(base), []
    for node in over:
        names = [_name(one) for one in merged]
        if _name(node) is None or _name(node) not in names:
            new.append(node)
            continue
        at = names.index(_name(node))
        merged[at : at + 1] = [*new, _merged(merged[at], node, (*path, at))]
        new = []
    return merged + new


def _name(node: _Node) -> str | None:
    name = node.value.get("name") if isinstance(node.value, dict) else None
    return name.value if name and isinstance(name.value, str) else None


def _kinds(data: _Node) -> list[bool]:
    return (
        [any(kind & data.value.keys()) for kind in DATA_KINDS]
        if data.value.keys() & set.union(*DATA_KINDS)
        else []
    )


def _as_lists(base: dict[str, _Node], over: dict[str, _Node]) -> None:
    """Makes `student:` a list of one, named, in a stage whose other side has `students:`."""
    for one, other in ((base, over), (over, base)):
        student = one.get("student")
        taken_away = "students" in one or "student" in other  # by `KEY: null` beside the other key
        if student and "students" in other and isinstance(student.value, dict) and not taken_away:
            named = {"name": base["name"]} | student.value
            del one["student"]
            one["students"] = _Node(student.place, [_Node(student.place, named)])
