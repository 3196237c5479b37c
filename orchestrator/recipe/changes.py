"""What a changed recipe does to work that is there already: which stages it invalidates, and why.

Compares two records, each a recipe's `result_fields` and the fingerprints of its data. A stage is invalidated by a
change of its own fields, of what all stages share (seed, data, precision), or of a stage whose student teaches it.
Stages go by name: one that is moved, added or left out changes no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minilm.orchestrator.recipe.schema import BUILT_WITH

SHARED = ("seed", "data", "compute")


def invalidated_stages(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Why, by stage of the new record, in its order. `old`, `new`: {"recipe": …, "data": [[place, fingerprint], …]}.

    Where either has no fingerprints, they are not compared.
    """
    why_all = "; ".join(shared_changes(old, new))
    before = {stage["name"]: stage for stage in old["recipe"]["stages"]}
    found: dict[str, str] = {}
    changed_students: dict[str, str] = {}
    for stage in new["recipe"]["stages"]:
        name = stage["name"]
        if why_all:
            found[name] = why_all
        elif name not in before:
            found[name] = f"stage {name} is new in the recipe"
        elif difference := first_difference(before[name], stage):
            found[name] = told(f"stages.{name}", difference)
        elif stage["teacher"] in changed_students:
            found[name] = (
                f"its teacher {stage['teacher']} comes from stage {changed_students[stage['teacher']]}"
            )
        if name in found:
            changed_students |= {student["name"]: name for student in stage["students"]}
    return found


def told(path: str, difference: tuple[str, Any, Any]) -> str:
    """A difference in words; `path` as `--set` takes it."""
    inner, before, now = difference
    whole = ".".join(part for part in (path, inner) if part)
    return f"{whole} is {_short(before)} there and {_short(now)} now"


def text_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Would the data set that is built from the recipe's text be another one?"""
    before, now = (record["recipe"]["data"] for record in (old, new))
    seeds = old["recipe"]["seed"], new["recipe"]["seed"]
    return seeds[0] != seeds[1] or any(before.get(key) != now.get(key) for key in BUILT_WITH)


def shared_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs of what all stages share, in words."""
    differences = {key: first_difference(old["recipe"][key], new["recipe"][key]) for key in SHARED}
    changes = [told(key, difference) for key, difference in differences.items() if difference]
    pairs = zip(old.get("data") or (), new.get("data") or (), strict=False)
    for (_, before), (place, now) in pairs:
        if before != now and not changes:
            changes = [
                f"data set {place} was replaced: its fingerprint was {before[:12]}…, is {now[:12]}… now"
            ]
    return changes


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Where two `result_fields()` differ first: (path, old value, new value), or None.

    The path is written as `--set` takes it. A key or item that one side lacks counts as None there.
    """
    if type(old) is type(new) and isinstance(old, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
    elif type(old) is type(new) and isinstance(old, list | tuple):
        length = max(len(old), len(new))
        pairs = [(i, _item(old, i), _item(new, i)) for i in range(length)]
    else:
        return None if old == new else ("", old, new)
    for key, left, right in pairs:
        if (found := first_difference(left, right)) is not None:
            path, *values = found
            return f"{key}.{path}" if path else str(key), values[0], values[1]
    return None


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None
