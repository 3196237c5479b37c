"""`${NAME}` and `${NAME:-DEFAULT}` in a recipe's values.

A variable is what `--set vars.NAME=VALUE` says, else the recipe's `vars:` section, else the environment, else the
default: what a recipe says of itself is not changed by what happens to stand in an environment. A value that is one
variable and no more is read as YAML reads it (a number stays one). Empty counts as not set.

Leaves out secrets: a recipe is copied into records and reports, so that names that sound like one are not read.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from minilm.orchestrator.errors import RecipeErrors
from minilm.orchestrator.recipe.yaml_source import (
    ENVIRONMENT,
    OVERRIDE,
    Expanded,
    KeyPath,
    Source,
    plain_value,
)

_USE = re.compile(r"\$\{([^{}]*)\}")
_INSIDE = re.compile(r"([A-Za-z_]\w*)(?::-(.*))?", re.DOTALL)
# a whole word of a name, or its end: PGPASSWORD, HFTOKEN, MYSQL_PWD; PWD alone is the current folder
_SECRET = re.compile(
    r"(?:^|_)(?:pass|pw|key|auth|pat)(?:_|$)|(?:secrets?|password|passwd|token|credentials?|apikey)(?:_|$)|_pwd$",
    re.IGNORECASE,
)


class _Unknown(Exception):
    """Why a variable has no value, in words."""


def expand(source: Source, environment: Mapping[str, str] = os.environ) -> list[tuple[KeyPath, str]]:
    """Puts values in the place of variables, in place, and takes `vars` out. Returns the problems by their paths.

    Raises RecipeErrors for a malformed `vars`, without which nothing can be said of the values that ask for it.
    """
    given = source.values.pop("vars", None)
    if given is not None and not isinstance(given, dict):
        what = f"given {given!r}; allowed: a mapping of NAME: VALUE lines"
        raise RecipeErrors([source.problem(("vars",), what)])
    variables = _Variables(given or {}, source, environment)
    problems: list[tuple[KeyPath, str]] = [
        (("vars", name), "given a list or mapping; allowed: one text, number, true or false")
        for name, value in variables.given.items()
        if isinstance(value, dict | list)
    ]
    problems += [
        (("vars", name), "given a name with other characters; allowed: letters, digits and _, no digit first")
        for name in variables.given
        if not re.fullmatch(r"[A-Za-z_]\w*", name)
    ]
    if problems:
        raise RecipeErrors([source.problem(path, text) for path, text in problems])
    _walk(source.values, (), source, variables, problems)
    for name in variables.given:
        if name not in variables.used and source.place(("vars", name)) == OVERRIDE:
            close = difflib.get_close_matches(name, variables.used, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            problems.append((("vars", name), f"no value of the recipe has ${{{name}}} in it{guess}"))
    return problems


def _walk(
    parent: Any, path: KeyPath, source: Source, variables: _Variables, problems: list[tuple[KeyPath, str]]
) -> None:
    for key in parent if isinstance(parent, dict) else range(len(parent)):
        value, at = parent[key], (*path, key)
        if isinstance(value, dict | list):
            _walk(value, at, source, variables, problems)
        elif isinstance(value, str) and "${" in value:
            try:
                parent[key], source.expanded[at] = variables.fill(value, source.place(at))
            except _Unknown as unknown:
                problems.append((at, str(unknown)))


class _Variables:
    """The variables of a recipe. used: the names that were asked for."""

    def __init__(self, given: dict[str, Any], source: Source, environment: Mapping[str, str]) -> None:
        self.given, self.source, self.environment = given, source, environment
        self.used: set[str] = set()

    def fill(self, text: str, place: str, asking: tuple[str, ...] = ()) -> tuple[Any, Expanded]:
        """The value of a text at `place`. asking: the variables whose values are being filled in."""
        if len(_USE.findall(text)) != text.count("${"):
            raise _Unknown(
                f"given {text!r}; allowed: ${{NAME}} or ${{NAME:-DEFAULT}}, and no braces in the default"
            )
        parts: list[str] = []
        names: list[str] = []
        end, begins = 0, place
        for use in _USE.finditer(text):
            value, inner = self.value(use[1], place, asking)
            begins = inner.place if use.start() == 0 else begins
            names += inner.names
            if use[0] == text:
                return value, Expanded(text, begins, tuple(names))
            parts += [text[end : use.start()], str(value).lower() if isinstance(value, bool) else str(value)]
            end = use.end()
        return "".join([*parts, text[end:]]), Expanded(text, begins, tuple(names))

    def value(self, inside: str, place: str, asking: tuple[str, ...]) -> tuple[Any, Expanded]:
        """What stands between the braces: value and whence."""
        match = _INSIDE.fullmatch(inside)
        if match is None:
            raise _Unknown(
                f"given '${{{inside}}}'; allowed: ${{NAME}} or ${{NAME:-DEFAULT}}, a name of letters, digits and _"
            )
        name, default = match.groups()
        self.used.add(name)
        if name not in asking and self.given.get(name) not in (None, ""):
            value, where = self.given[name], self.source.place(("vars", name))
            if isinstance(value, str) and "${" in value:
                return self.fill(value, where, (*asking, name))
            return value, Expanded("", where, ())
        if found := self.environment.get(name):
            if _SECRET.search(name):
                raise _Unknown(
                    f"{name} sounds like a secret, and a recipe is copied into records; allowed: another name, under "
                    f"vars or in the environment (credentials of buckets and servers are read from there by themselves)"
                )
            return plain_value(found), Expanded("", ENVIRONMENT, (name,))
        if default:
            return plain_value(default), Expanded("", place, ())
        close = difflib.get_close_matches(name, [*self.given, *self.environment], n=1, cutoff=0.8)
        close = [one for one in close if one != name]
        guess = f" (there is {close[0]})" if close else ""
        raise _Unknown(
            f"the variable {name} has no value{guess}; give it in the environment, under vars, by "
            f"--set vars.{name}=VALUE or with a default: ${{{name}:-VALUE}}"
        )
