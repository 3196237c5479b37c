"""The recipes that come with the package, as their files say it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minilm.orchestrator.recipe.load import load_recipe

LIBRARY = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class PackagedStudent:
    """A student with the steps of its stage."""

    name: str
    stage: str
    layers: int
    hidden: int
    steps: int


@dataclass(frozen=True)
class PackagedRecipe:
    """teacher: of the first stage, as the file has it. purpose: the sentence in the file's head. students: in order."""

    name: str
    file: str
    purpose: str
    teacher: str
    students: tuple[PackagedStudent, ...]


def packaged_recipes() -> list[PackagedRecipe]:
    """In the order of their names."""
    return [describe(path) for path in sorted(LIBRARY.glob("*.yaml"))]


def describe(path: Path) -> PackagedRecipe:
    recipe = load_recipe(path)
    students = tuple(
        PackagedStudent(student.name, stage.name, student.layers, student.hidden, stage.steps)
        for stage in recipe.stages
        for student in stage.students
    )
    purpose = purpose_of(path.read_text(encoding="utf-8"))
    return PackagedRecipe(
        recipe.name, str(path), purpose, recipe.stages[0].result_fields()["teacher"], students
    )


def purpose_of(text: str) -> str:
    """The part "Purpose:" of a file's head, on one line; "" where there is none."""
    words: list[str] = []
    for line in text.splitlines():
        _, mark, rest = line.partition("# Purpose:")
        if mark:
            words.append(rest.strip())
        elif words and line.startswith("#           "):
            words.append(line.removeprefix("#").strip())
        elif words:
            break
    return " ".join(words)
