"""From a recipe file to frozen types: read, override, validate, or say everything that is wrong at once.

    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["stages.0.steps=20"])

Files that a recipe names need not exist to load it (a recipe is often checked on another machine than
it runs on): `missing_inputs` lists those. Importing this loads neither torch nor Ray nor MLflow.

Invariant: a Recipe that was returned satisfies every rule of `schema` and `rules`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.recipe.changes import first_difference
from minilm.orchestrator.recipe.fields import INITIALIZATIONS
from minilm.orchestrator.recipe.language import assistant, variables
from minilm.orchestrator.recipe.language.extends import read_chain
from minilm.orchestrator.recipe.missing import missing_inputs
from minilm.orchestrator.recipe.references import VARIABLE, expanded, looks_like_path, package_path
from minilm.orchestrator.recipe.rules import Problem, check_across, explain, follows_from_another
from minilm.orchestrator.recipe.schema import (
    CORPUS_PLACES,
    Compute,
    Corpus,
    Data,
    Recipe,
    Stage,
    Student,
    Tracking,
)
from minilm.orchestrator.recipe.yaml_source import KeyPath, Source, override

__all__ = [
    "Compute",
    "Corpus",
    "Data",
    "Recipe",
    "Stage",
    "Student",
    "Tracking",
    "first_difference",
    "load_recipe",
    "missing_inputs",
    "read_recipe",
]


ANCHORS = "x-"  # keys at the top that begin so hold mappings for merge keys, and are read by nothing else
Section = TypeVar("Section", bound=BaseModel)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, after `overrides` (each `path=value`, as `stages.0.steps=20`).

    Relative paths count from the folder of the file that they stand in, those in overrides and in the environment from
    the current one; the result holds absolute paths. Raises RecipeErrors with a line for every problem.
    """
    return read_recipe(path, overrides)[0]


def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None
) -> tuple[Recipe, Source]:
    """The recipe, and where its values stand: paths of `Source` are those of the recipe's own values.

    text: what the file is to hold that is not written yet. Raises RecipeErrors with a line for every problem.
    """
    source = read_chain(Path(path), text)
    override(source, overrides)
    if "extends" in source.values:
        raise RecipeErrors(
            [source.problem(("extends",), "allowed in a file only: write one that extends it")]
        )
    for key in [key for key in source.values if key.startswith(ANCHORS)]:
        del source.values[key]
    problems: list[Problem] = variables.expand(source)
    without_value = [path for path, _ in problems]
    as_written = _anchor_paths(source)
    source, wrong = assistant.expand(source, may_add=not problems)
    problems += wrong
    try:
        recipe = Recipe.model_validate(source.values, context=as_written)
        problems += check_across(dict(enumerate(recipe.stages)), recipe.compute, recipe.data)
    except ValidationError as error:
        problems += [
            (details["loc"], explain(details, _written(source, details["loc"])))
            for details in error.errors(include_url=False)
            if not follows_from_another(details)
            and not _echoes_stage_name(source, details["loc"])
            and not any(as_the_file_has_it(source, details["loc"])[: len(p)] == p for p in without_value)
        ]
        problems += _check_sound_parts(source.values)
    if problems:
        raise RecipeErrors(_in_file_order(source, problems))
    return recipe, source


def _written(source: Source, path: KeyPath) -> str | None:
    """What the file says at `path` where that asks the environment, whose values no message repeats."""
    found = source.expanded.get(as_the_file_has_it(source, path))
    return found.written if found and found.names else None


def _check_sound_parts(values: dict[str, Any]) -> list[Problem]:
    """The rules across keys for those parts of a broken recipe that are sound in themselves."""
    given = values.get("stages")
    stages = {i: _sound(Stage, stage) for i, stage in enumerate(given)} if isinstance(given, list) else {}
    compute = _sound(Compute, values.get("compute", {}))
    data = _sound(Data, values.get("data"))
    return list(check_across({i: stage for i, stage in stages.items() if stage}, compute, data))


def _sound(section: type[Section], value: Any) -> Section | None:
    try:
        return section.model_validate(value)
    except ValidationError:
        return None


def _in_file_order(source: Source, problems: Sequence[Problem]) -> list[str]:
    """One line a problem, doubles removed, in the order of the file and then of the overrides."""

    def position(line: str) -> tuple[int, int]:
        place = line.partition(": ")[0]
        file, _, number = place.rpartition(":")
        order = source.files.index(file) if file in source.files else -1
        if place in source.files:
            order = source.files.index(place)
        return order % (len(source.files) + 1), int(number) if number.isdecimal() else 0

    lines = [source.problem(as_the_file_has_it(source, path), text) for path, text in problems]
    return sorted(dict.fromkeys(lines), key=position)


def _echoes_stage_name(source: Source, path: KeyPath) -> bool:
    """Whether `path` is the name that a `student:` takes over from its stage, where it is said already."""
    if path[:1] != ("stages",) or path[2:] != ("students", 0, "name"):
        return False
    stage = source.values["stages"][path[1]]
    return "student" in stage and (*path[:2], "student", "name") not in source.places


def as_the_file_has_it(source: Source, path: KeyPath) -> KeyPath:
    """Turns stages.0.students.0.… back into stages.0.student.…, and the like, as the author wrote it."""
    if path[:2] == ("data", "corpora"):
        data = source.values["data"]
        if isinstance(data, list):
            return ("data", *path[2:])
        return path if "corpora" in data else ("data", *path[3:])
    if path[:1] != ("stages",) or len(path) < 3:
        return path
    if path[2:4] == ("students", 0) and "student" in source.values["stages"][path[1]]:
        return (*path[:2], "student", *path[4:])
    if path[2:] == ("micro_batch",) and path not in source.places:
        return ("compute", "micro_batch")
    return path


def _anchor_paths(source: Source) -> dict[str, str]:
    """Makes local paths absolute in place. Returns absolute → as written, for those that stay portable."""
    values, as_written = source.values, {}
    stages = values.get("stages") if isinstance(values.get("stages"), list) else []
    students = [name for stage in stages for name in _student_names(stage)]

    def anchor(parent: Any, key: Any, path: KeyPath, *, is_path: bool) -> None:
        text = parent[key]
        if not isinstance(text, str):
            return
        folder = source.counts_from(path)
        absolute = _absolute(text, folder or Path.cwd(), is_path)
        if absolute is None:
            return
        parent[key] = absolute
        if text.startswith("package:"):
            as_written[absolute] = text
        elif folder is not None:
            as_written[absolute] = _from_first_file(text, absolute, folder, Path(source.file).parent)

    data = values.get("data")
    if isinstance(data, dict):
        if isinstance(data.get("text"), str):
            data["text"] = [data["text"]]
        for i in range(len(data["text"]) if isinstance(data.get("text"), list) else 0):
            anchor(data["text"], i, ("data", "text", i), is_path=True)
        for key in data.keys() & {"tokenizer", "cache"}:
            anchor(data, key, ("data", key), is_path=key == "cache")
    for corpus, at in _raw_corpora(data):
        for key in corpus.keys() & set(CORPUS_PLACES):
            anchor(corpus, key, (*at, key), is_path=key != "source_tokenizer")
    compute = values.get("compute")
    if isinstance(compute, dict) and "checkpoints" in compute:
        anchor(compute, "checkpoints", ("compute", "checkpoints"), is_path=True)
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and "data" in evaluation:
        anchor(evaluation, "data", ("evaluation", "data"), is_path=True)
    for i, stage in enumerate(stages):
        if isinstance(stage, dict) and "teacher" in stage and stage["teacher"] not in students:
            anchor(stage, "teacher", ("stages", i, "teacher"), is_path=False)
        measured = stage.get("evaluate") if isinstance(stage, dict) else None
        for j, item in enumerate(measured if isinstance(measured, list) else ()):
            if isinstance(item, dict) and "data" in item:
                anchor(item, "data", ("stages", i, "evaluate", j, "data"), is_path=True)
        for student, at in _raw_students(stage):
            if "init" in student and student["init"] not in (*INITIALIZATIONS, *students):
                anchor(student, "init", ("stages", i, *at, "init"), is_path=False)
    return as_written


def _from_first_file(text: str, absolute: str, folder: Path, first: Path) -> str:
    """A path as the first file would have it: as written, unless it is relative and counts from another folder."""
    if text.startswith(("/", "~")) or folder.resolve() == first.resolve():
        return text
    relative = os.path.relpath(absolute, os.path.abspath(first))  # noqa: PTH100 (resolve follows links)
    return relative if relative.startswith(".") else f"./{relative}"


def _raw_corpora(data: Any) -> list[tuple[dict[str, Any], KeyPath]]:
    """The mappings that may hold a corpus's places in a raw, perhaps malformed data section, each with its path."""
    found: list[tuple[Any, KeyPath]] = [(data, ("data",))]
    listed = data.get("corpora") if isinstance(data, dict) else data
    at: KeyPath = ("data", "corpora") if isinstance(data, dict) else ("data",)
    found += [(item, (*at, i)) for i, item in enumerate(listed if isinstance(listed, list) else ())]
    return [(item, path) for item, path in found if isinstance(item, dict)]


def _absolute(text: str, base: Path, is_path: bool) -> str | None:
    """Where a path lies that counts from `base`, or a package's file; None for what is no local path.

    What could be a hub id or a folder is a folder if there is one. A package that is absent stays as it is.
    """
    if text.startswith("package:"):
        try:
            return str(package_path(text))
        except UserError:
            return None
    if not text or "://" in text or text.startswith("models:") or VARIABLE.search(text):
        return None
    if str(given := expanded(text)).startswith(
        "~"
    ):  # of a user that there is not: stays as it is, to be told
        return None
    path = Path(os.path.abspath(base / given))  # noqa: PTH100 (resolve follows links)
    return str(path) if is_path or looks_like_path(text) or path.is_dir() else None


def _student_names(stage: Any) -> set[str]:
    """Names of the students that a raw, perhaps malformed stage defines."""
    named = [
        student.get("name", stage.get("name") if at == ("student",) else None)
        for student, at in _raw_students(stage)
    ]
    return {name for name in named if isinstance(name, str)}


def _raw_students(stage: Any) -> list[tuple[dict[str, Any], KeyPath]]:
    """The students in a raw, perhaps malformed stage, each with its path from there."""
    if not isinstance(stage, dict):
        return []
    listed = stage.get("students")
    found: list[tuple[Any, KeyPath]] = [(stage.get("student"), ("student",))]
    found += [
        (student, ("students", i)) for i, student in enumerate(listed if isinstance(listed, list) else ())
    ]
    return [(student, at) for student, at in found if isinstance(student, dict)]
