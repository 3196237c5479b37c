"""What somebody wants of a recipe that is not written yet: the five answers of `minilm new`, each read and checked.

Every function raises `UserError` with the flag's name, what was given and what is allowed. Imports no torch.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.plan.hardware import DEVICES, parse_hardware
from minilm.orchestrator.recipe.references import (
    FolderRef,
    RegistryRef,
    absent_package,
    looks_like_path,
    parse_reference,
)

USES = ("fine-tuning", "embeddings")
HERE = "here"  # this machine, as --hardware
MOST_WORKERS = 256  # rows of a step
_TARGET = re.compile(r"(\d+(?:\.\d+)?) *(k|m|b|ms|s)", re.IGNORECASE)
_PARAMETERS = {"k": 1e3, "m": 1e6, "b": 1e9}
_TIME = re.compile(r"(\d+(?:\.\d+)?) *(s|min|m|h|d) *", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Target:
    """The most that the student may have: parameters, or milliseconds for a text on this machine. One is None."""

    given: str
    parameters: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Budget:
    """The most seconds of training."""

    given: str
    seconds: float


@dataclass(frozen=True)
class Wish:
    """teacher, text: as the recipe is to have them, which lies in the folder that relative ones count from.

    hardware: `HERE` or a device of a data sheet. workers: one a device.
    """

    name: str
    teacher: str
    text: tuple[str, ...]
    use: str
    target: Target
    hardware: str
    workers: int
    budget: Budget


def recipe_file(out: Path) -> Path:
    """Where the recipe will lie: nothing may lie there yet."""
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"given {str(out)!r}; allowed: the name of a new file that ends in .yaml")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already and stays as it is; give another name")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"given {str(out)!r}, but {out.parent} is no folder; give another name")
    return out


def recipe_name(out: Path) -> str:
    """What the file's name says, as a recipe's `name` may be written."""
    return re.sub(r"[^a-z0-9]+", "-", out.stem.lower()).strip("-")[:63].strip("-") or "mine"


def teacher_reference(given: str, folder: Path) -> str:
    """The teacher as a recipe in `folder` names it."""
    if absent := absent_package(given):
        raise UserError(f"--teacher: {absent}, or give another")
    if Path(given).is_dir() and not looks_like_path(given):
        given = f"./{given}"  # as in a recipe: what could be a hub id or a folder is a folder if there is one
    try:
        ref = parse_reference(given)
    except UserError as error:
        raise UserError(f"--teacher: {error}") from None
    if isinstance(ref, RegistryRef):
        raise UserError(
            f"--teacher: given {given!r}, and a model in a registry can't be looked at; bring it here "
            f"(minilm pull {given} FOLDER) and give the folder"
        )
    if isinstance(ref, FolderRef) and not (ref.path / "config.json").is_file():
        there = "has no config.json" if ref.path.is_dir() else "is not there"
        raise UserError(
            f"--teacher: given {given!r}, which {there}; allowed: a model's folder in the format of transformers, "
            f"package:IMPORT_NAME/FOLDER or a hub id OWNER/NAME"
        )
    return _from(folder, "--teacher", given) if isinstance(ref, FolderRef) else given


def text_paths(given: list[str], folder: Path) -> tuple[str, ...]:
    """The text as a recipe in `folder` names it."""
    for path in given:
        if absent := absent_package(path):
            raise UserError(f"--text: {absent}, or give another")
        if path.startswith("package:"):
            continue
        here = Path(path).expanduser()
        if not path or not (here.exists() or glob.glob(str(here), recursive=True)):  # noqa: PTH207 (a pattern)
            raise UserError(
                f"--text: given {path!r}, but there is no such file, or none that matches; allowed: files, folders, "
                f"globs or package:IMPORT_NAME/FILE"
            )
        if (here / "manifest.json").is_file():
            raise UserError(
                f"--text: given {path!r}, which is a data set already; allowed: the text that it was built from"
            )
    return tuple(_from(folder, "--text", path) for path in given)


def use_of(given: str) -> str:
    if given not in USES:
        raise UserError(f"--use: given {given!r}; allowed: {' or '.join(USES)}")
    return given


def target_of(given: str) -> Target:
    """ "22M" or "10ms"."""
    found = _TARGET.fullmatch(given.strip())
    value = float(found[1]) if found else 0.0
    if not found or value <= 0:
        raise UserError(
            f"--target: given {given!r}; allowed: the student's most parameters, as 22M, or its most milliseconds for "
            f"a text, as 10ms"
        )
    unit = found[2].lower()
    if unit in _PARAMETERS:
        return Target(given, parameters=value * _PARAMETERS[unit])
    return Target(given, milliseconds=value * (1000 if unit == "s" else 1))


def hardware_of(given: str) -> tuple[str, int]:
    """ "here" → ("here", 0), "h100x8" → ("h100", 8)."""
    if given == HERE:
        return HERE, 0
    try:
        device, workers = parse_hardware(given)
    except UserError:
        raise UserError(
            f"--hardware: given {given!r}; allowed: {HERE} (this machine, measured), {', '.join(DEVICES)}, each of "
            f"these also with a number, as h100x8"
        ) from None
    if workers > MOST_WORKERS:
        raise UserError(
            f"--hardware: given {given!r}; a step of {MOST_WORKERS} rows has work for {MOST_WORKERS} devices at most"
        )
    return device, workers


def budget_of(given: str) -> Budget:
    """ "24h" or "1h30m"."""
    text = given.strip()
    seconds = sum(float(number) * _SECONDS[unit.lower()] for number, unit in _TIME.findall(text))
    if _TIME.sub("", text) or not seconds:
        raise UserError(f"--budget: given {given!r}; allowed: a time of training, as 90m, 24h or 3d")
    return Budget(text, seconds)


def _from(folder: Path, flag: str, given: str) -> str:
    """A relative path of the current folder as one that counts from `folder`; others as they are."""
    path = given
    if not path.startswith(("package:", "~", "/")):
        path = os.path.relpath(path, folder)
        path = path if path.startswith(".") else f"./{path}"
    if "${" in path:
        raise UserError(
            f"{flag}: given {given!r}, and ${{ begins a variable in a recipe; give a path without it"
        )
    return path
