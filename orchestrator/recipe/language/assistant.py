"""`assistant:` of a stage: the papers' teacher assistant as a stage of its own, made by rule.

    assistant: auto      one where the rule asks for it: M <= L / 2 layers and at most half of the teacher's hidden size
    assistant: 12        one of 12 layers in any case; for a teacher whose shape is not known here
    assistant: none      none

Of a teacher of L layers and a student of M layers and hidden size d it makes teacher → L x d → student (MiniLM, Wang
et al. 2020, section 3.3). The stage NAME-assistant stands before the stage and has its keys; the assistant's layers
begin at random or, with `init: teacher-layers` or `teacher-pca`, as parts of the teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.fields import INITIALIZATIONS
from minilm.orchestrator.recipe.references import (
    FolderRef,
    HubRef,
    absent_package,
    parse_reference,
)
from minilm.orchestrator.recipe.yaml_source import KeyPath, Source

# of teachers of the hub that the papers and the packaged recipes name: layers, hidden size
HUB_SHAPES = {
    "google-bert/bert-base-uncased": (12, 768),
    "google-bert/bert-base-cased": (12, 768),
    "google-bert/bert-base-multilingual-cased": (12, 768),
    "google-bert/bert-large-uncased": (24, 1024),
    "google-bert/bert-large-uncased-whole-word-masking": (24, 1024),
    "FacebookAI/roberta-base": (12, 768),
    "FacebookAI/roberta-large": (24, 1024),
    "FacebookAI/xlm-roberta-base": (12, 768),
    "FacebookAI/xlm-roberta-large": (24, 1024),
    "answerdotai/ModernBERT-base": (22, 768),
    "answerdotai/ModernBERT-large": (28, 1024),
    "EuroBERT/EuroBERT-210m": (12, 768),
    "microsoft/mpnet-base": (12, 768),
    "sentence-transformers/all-mpnet-base-v2": (12, 768),
    "sentence-transformers/all-MiniLM-L6-v2": (6, 384),
    "sentence-transformers/all-MiniLM-L12-v2": (12, 384),
}
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_HIDDEN = ("hidden_size", "dim", "n_embd", "d_model")
Shape = tuple[int, int]


def asks_for_assistant(teacher: Shape, student: Shape) -> bool:
    """The papers' rule, of (layers, hidden)."""
    return 2 * student[0] <= teacher[0] and 2 * student[1] <= teacher[1]


def known_shape(reference: str) -> Shape | None:
    """Layers and hidden size of a model whose config is on this machine, or that the papers name."""
    try:
        ref = None if absent_package(reference) else parse_reference(reference)
    except UserError:
        return None
    if isinstance(ref, HubRef):
        return HUB_SHAPES.get(ref.id)
    if not isinstance(ref, FolderRef):
        return None
    try:
        config = json.loads((ref.path / "config.json").read_text(encoding="utf-8"))
        layers, hidden = (next(config[key] for key in keys if key in config) for keys in (_LAYERS, _HIDDEN))
    except (OSError, ValueError, StopIteration, TypeError, RuntimeError):
        return None
    return (layers, hidden) if isinstance(layers, int) and isinstance(hidden, int) else None


def known_tokens(reference: str) -> int | None:
    """The longest row that a model takes which the papers name by its hub id."""
    if reference not in HUB_SHAPES:
        return None
    return 8192 if reference.startswith(("answerdotai/ModernBERT-", "EuroBERT/")) else 512


def expand(source: Source, *, may_add: bool = True) -> tuple[Source, list[tuple[KeyPath, str]]]:
    """The source with a stage for each assistant, and the problems. Paths in it are absolute already.

    may_add: False of a recipe that is refused anyway; its stages keep their numbers.
    """
    stages = source.values.get("stages")
    if not isinstance(stages, list) or not any(isinstance(s, dict) and "assistant" in s for s in stages):
        return source, []
    problems: list[tuple[KeyPath, str]] = []
    made: list[Any] = []
    numbers: list[int] = []
    notes: dict[int, str] = {}
    moved: dict[KeyPath, KeyPath] = {}  # path after → path before, of all that has a place
    shapes: dict[str, Shape] = {}
    for number, stage in enumerate(stages):
        at: KeyPath = ("stages", number)
        own = [path for path in source.places if path[:2] == at]
        if isinstance(stage, dict) and "assistant" in stage:
            stage = dict(stage)
            layers, why = _layers(stage.pop("assistant"), stage, shapes)
            if layers is None:
                problems.append(((*at, "assistant"), why))
            elif why:
                notes[len(made)] = why
            if layers and may_add:
                first = (*at, *_first(stage)[0])
                new: KeyPath = ("stages", len(made))
                moved |= {(*new, *p[2:]): p for p in own if p[2:3] not in (("student",), ("students",))}
                moved |= {(*new, "student", *p[len(first) :]): p for p in own if p[: len(first)] == first}
                moved |= {(*new, "student", "layers"): (*at, "assistant")}
                moved = {
                    new_path: p for new_path, p in moved.items() if new_path != (*new, "student", "name")
                }
                made.append(_assistant(stage, layers))
                numbers.append(number)
                stage["teacher"] = made[-1]["name"]
                stage.pop("teacher_layer", None)
        moved |= {("stages", len(made), *p[2:]): p for p in own}
        made.append(stage)
        numbers.append(number)
        shapes |= {name: shape for name, shape in _students(stage) if shape}
    others = {path: path for path in source.places if path[:1] != ("stages",) or len(path) == 1}
    return replace(
        source,
        values=source.values | {"stages": made},
        places={new: source.places[old] for new, old in (others | moved).items()},
        expanded={
            new: source.expanded[old] for new, old in (others | moved).items() if old in source.expanded
        },
        stages=tuple(numbers),
        notes=notes,
    ), problems


def _layers(wanted: Any, stage: dict[str, Any], shapes: Mapping[str, Shape]) -> tuple[int | None, str]:
    """How many layers the assistant has, 0 for none, with the reason; None with what is wrong with the key."""
    number = isinstance(wanted, int) and not isinstance(wanted, bool)
    if wanted in (None, "none"):
        return 0, ""
    if wanted != "auto" and not (number and wanted > 0):
        return None, f"given {wanted!r}; allowed: auto, none, or the assistant's number of layers"
    students = dict(_students(stage))
    malformed = not isinstance(stage.get("name"), str) or {"student", "students"} <= stage.keys()
    if malformed or not students or not all(students.values()):
        return 0, ""  # what is wrong is complained about where it stands
    sizes = sorted({shape[1] for shape in students.values() if shape})
    if len(sizes) > 1:
        both = " and ".join(map(str, sizes))
        return (
            None,
            f"given {wanted!r} with students of hidden sizes {both}; allowed: one; give each size its own stage",
        )
    listed = ", ".join(f"{layers} x {hidden}" for layers, hidden in filter(None, students.values()))
    if number:
        return wanted, f"assistant: {wanted} makes {wanted} x {sizes[0]} from the teacher, then {listed}"
    teacher = stage.get("teacher")
    shape = shapes.get(str(teacher)) or known_shape(str(teacher))
    if shape is None:
        return None, (
            f"given 'auto', but the shape of the teacher {teacher!r} is not known on this machine; give a folder with "
            f"its config.json (--set stages.{stage.get('name')}.teacher=FOLDER), or its number of layers here, as "
            f"assistant: 12"
        )
    asked = {name: asks_for_assistant(shape, own) for name, own in students.items() if own}
    if len(set(asked.values())) > 1:
        some = ", ".join(name for name, ask in asked.items() if ask)
        return (
            None,
            f"given 'auto', which asks for one for {some} only; give those students a stage of their own",
        )
    rule = f"(at most {shape[0] // 2} layers and hidden {shape[1] // 2})"
    from_to = f"{listed} from {shape[0]} x {shape[1]}"
    if not any(asked.values()):
        return 0, f"assistant: auto makes none: {from_to} keeps more than half {rule}"
    return (
        shape[0],
        f"assistant: auto makes {shape[0]} x {sizes[0]}: {from_to} is half of both or less {rule}",
    )


def _students(stage: Any) -> list[tuple[str, Shape | None]]:
    """Names and shapes of a raw stage's students; None for a shape that is none."""
    if not isinstance(stage, dict):
        return []
    given: list[Any] = (
        [{"name": stage.get("name")} | stage["student"]] if isinstance(stage.get("student"), dict) else []
    )
    given += stage["students"] if isinstance(stage.get("students"), list) else []
    return [(str(s.get("name")), _shape(s)) if isinstance(s, dict) else ("", None) for s in given]


def _shape(student: Mapping[str, Any]) -> Shape | None:
    layers, hidden = student.get("layers"), student.get("hidden")
    if not isinstance(layers, int) or not isinstance(hidden, int) or isinstance(layers, bool):
        return None
    return layers, hidden


def _first(stage: Mapping[str, Any]) -> tuple[KeyPath, dict[str, Any]]:
    if "student" in stage:
        return ("student",), stage["student"]
    return ("students", 0), stage["students"][0]


def _assistant(stage: dict[str, Any], layers: int) -> dict[str, Any]:
    """The assistant's stage: all keys of the stage, and one student with its first student's keys."""
    own = {key: deepcopy(value) for key, value in stage.items() if key not in ("student", "students")}
    student = {key: value for key, value in _first(stage)[1].items() if key != "name"}
    if student.get("init") not in (None, *INITIALIZATIONS):
        del student["init"]  # a model of the student's shape
    return own | {"name": f"{stage['name']}-assistant", "student": student | {"layers": layers}}
