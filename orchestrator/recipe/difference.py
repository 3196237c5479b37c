"""What differs between two recipes, key by key, and what that does to the stages that the first one has trained.

Stages, students, relations and corpora are matched by their names, as `--set` finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minilm.orchestrator.recipe.changes import invalidated_stages
from minilm.orchestrator.recipe.show import Shown
from minilm.orchestrator.recipe.yaml_source import KeyPath

Flat = dict[str, Any]  # path, as `--set` takes it → value


@dataclass(frozen=True)
class Difference:
    """One key. only_in: "A" or "B" of a stage, student, relation or corpus that the other lacks, else ""."""

    path: str
    old: Any
    new: Any
    only_in: str
    changes_result: bool

    def __str__(self) -> str:
        old, new = (json.dumps(value, ensure_ascii=False) for value in (self.old, self.new))
        what = f"only in {self.only_in}" if self.only_in else f"{old} → {new}"
        return f"{self.path}: {what}" + ("" if self.changes_result else "   (changes no result)")


@dataclass(frozen=True)
class Differences:
    """useless: why, by stage; kept: the stages whose work stays; new, left_out: those that only B or A has.

    other_name: neither recipe goes on in the other's work directory.
    """

    keys: tuple[Difference, ...]
    useless: Mapping[str, str]
    kept: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    other_name: bool

    def as_dict(self) -> dict[str, Any]:
        return {"same": not self.keys} | asdict(self)

    def text(self) -> str:
        if not self.keys:
            return "A and B are the same recipe"
        lines = [*map(str, self.keys), ""]
        if self.other_name:
            lines.append("B has another name, so that it needs a work directory of its own")
        lines += [f"useless of A's work: stage {name}, because {why}" for name, why in self.useless.items()]
        for what, names in (("kept", self.kept), ("new in B", self.new), ("left out in B", self.left_out)):
            lines += [f"{what}: {', '.join(names)}"] * bool(names)
        return "\n".join(lines)


def by_name(shown: Sequence[Shown]) -> Flat:
    """The values of a recipe by their paths, items of lists by their names."""
    names = {one.path[:-1]: str(one.value) for one in shown if one.path[-1] == "name"}

    def told(path: KeyPath) -> str:
        begins = [path[: n + 1] for n in range(len(path))]
        return ".".join(names.get(b, str(b[-1])) if isinstance(b[-1], int) else b[-1] for b in begins)

    return {told(one.path): one.value for one in shown}


def flatten(values: Any, path: tuple[str, ...] = ()) -> Flat:
    """The same of `result_fields`; a list of other values is a value."""
    if isinstance(values, dict) and path[-1:] != ("options",):
        return {k: v for key, value in values.items() for k, v in flatten(value, (*path, str(key))).items()}
    if (
        isinstance(values, list | tuple)
        and values
        and all(isinstance(v, dict) and "name" in v for v in values)
    ):
        return {k: v for value in values for k, v in flatten(value, (*path, str(value["name"]))).items()}
    return {".".join(path): list(values) if isinstance(values, tuple) else values}


def differences(
    old: Flat, new: Flat, old_result: Mapping[str, Any], new_result: Mapping[str, Any]
) -> Differences:
    """Of all values of two recipes, flat, and of their `result_fields`."""
    before, now = flatten(old_result), flatten(new_result)
    found: dict[str, Difference] = {}
    for path in [*old, *(path for path in new if path not in old)]:
        if path in old and path in new and old[path] == new[path]:
            continue
        matters = before.get(path) != now.get(path)
        lacking = old if path not in old else new if path not in new else None
        if lacking is None:
            found[path] = Difference(path, old[path], new[path], "", matters)
        else:
            item = _item(path, lacking)
            only_in = "B" if lacking is old else "A"
            matters = matters or (item in found and found[item].changes_result)
            found[item] = Difference(item, old.get(item), new.get(item), only_in, matters)
    stages = [[stage["name"] for stage in record["stages"]] for record in (old_result, new_result)]
    why = invalidated_stages({"recipe": old_result}, {"recipe": new_result})
    return Differences(
        keys=tuple(found.values()),
        useless={name: reason for name, reason in why.items() if name in stages[0]},
        kept=tuple(name for name in stages[1] if name not in why),
        new=tuple(name for name in stages[1] if name not in stages[0]),
        left_out=tuple(name for name in stages[0] if name not in stages[1]),
        other_name=old_result["name"] != new_result["name"],
    )


def _item(path: str, lacking: Flat) -> str:
    """The shortest beginning of `path` that `lacking` has nothing of."""
    parts = path.split(".")
    begins = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return next(b for b in begins if not any(p == b or p.startswith(f"{b}.") for p in lacking))
