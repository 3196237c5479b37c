"""The recipes that come with the package, as their files say it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.language.extends import read_chain
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.rules import suggest

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
    """teacher: of the first stage, as the file has it. purpose, hours: of the file's head. students: in order."""

    name: str
    file: str
    purpose: str
    hours: str
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
    text = path.read_text(encoding="utf-8")
    teacher = recipe.stages[0].result_fields()["teacher"]
    return PackagedRecipe(
        recipe.name, str(path), said_in_head(text, "Purpose"), said_in_head(text, "Hours"), teacher, students
    )


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copies a packaged recipe, and those that it extends, into `folder`; the copies, the recipe's first.

    Their heads name the schema where it lies and the command as it is typed now. Raises `UserError` for an unknown name
    and for a file that is there already with another content; then nothing is written.
    """
    names = [path.stem for path in sorted(LIBRARY.glob("*.yaml"))]
    if name.removesuffix(".yaml") not in names:
        raise UserError(f"given {name!r}{suggest(name, names)}; allowed: {', '.join(names)}")
    copies: dict[Path, str] = {}
    for file in read_chain(LIBRARY / f"{name.removesuffix('.yaml')}.yaml").files:
        target = folder / Path(file).name
        text = Path(file).read_text(encoding="utf-8")
        text = text.replace("$schema=schema.json", f"$schema={LIBRARY / 'schema.json'}")
        copies[target] = text.replace(f"recipes/{target.name}", str(target))
    for target, text in copies.items():
        if target.exists() and (not target.is_file() or target.read_text(encoding="utf-8") != text):
            raise UserError(
                f"{target} is there already, with another content; move it away, or copy to another folder: --to FOLDER"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target, text in copies.items():
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"can't write into {folder}: {error.strerror}; copy to another folder: --to FOLDER"
        ) from None
    return list(copies)


def said_in_head(text: str, key: str) -> str:
    """A part of a file's head, as "Purpose", on one line; "" where there is none."""
    words: list[str] = []
    for line in text.splitlines():
        _, mark, rest = line.partition(f"# {key}:")
        if mark:
            words.append(rest.strip())
        elif words and line.startswith("#           "):
            words.append(line.removeprefix("#").strip())
        elif words:
            break
    return " ".join(words)
