"""The shape of the code: imports go one way, names are ours alone, dependencies are declared and used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.rooms import (
    MAY_IMPORT,
    PACKAGES,
    ROOT,
    arrows,
    breaches,
    circle,
    file_graph,
    imported_files,
    mermaid,
    modules,
    room_of,
)

# Heavy or replaceable libraries live in one room each.
ONLY_IN = {
    "ray": {"orchestrator/launch", "data/builder"},
    "mlflow": {"orchestrator/tracking"},
    "matplotlib": {"orchestrator/tracking", "data/builder"},
    "pickle": set(),
}
IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "scikit-learn": "sklearn"}
MAX_ROOMS, MAX_MODULES = 16, 16


def all_modules() -> list[Path]:
    return [path for package in PACKAGES for path in modules(package)]


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_room_imports_only_what_it_may():
    assert not breaches()


def test_no_files_and_no_rooms_import_each_other_in_a_circle():
    assert circle(file_graph()) is None
    assert circle(arrows()) is None


def test_the_list_names_every_room_and_no_other():
    for package in PACKAGES:
        rooms = {room_of(path)[1] for path in modules(package)} - {""}
        assert rooms == set(MAY_IMPORT[package])


def test_no_house_has_too_many_rooms_and_no_room_too_many_modules():
    for package in PACKAGES:
        folders = Counter(path.parent for path in modules(package))
        assert len([folder for folder in folders if folder.parent == ROOT / package]) <= MAX_ROOMS
        assert max(folders.values()) <= MAX_MODULES + 1, folders  # and its __init__.py


def test_every_package_says_what_it_is_for_and_hands_nothing_on():
    for path in all_modules():
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
            assert len(tree.body) == 1, f"{path.relative_to(ROOT)} defines or hands on something"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_in_its_room_only(library):
    found = {str(path.parent.relative_to(ROOT)) for path in all_modules() if library in imported(path)}
    assert found <= ONLY_IN[library]


def test_loop_and_step_know_neither_ray_nor_mlflow():
    """Not even through another module of ours, imported when they are."""
    reached: set[Path] = set()
    todo = {ROOT / "orchestrator/worker/loop.py", ROOT / "orchestrator/train/step.py"}
    while todo:
        path = todo.pop()
        reached.add(path)
        todo |= imported_files(path) - reached
    assert ROOT / "model/loss/relations.py" in reached
    for path in reached:
        assert not imported(path) & {"ray", "mlflow"}, path


def test_the_readme_shows_the_rooms_as_they_are():
    assert mermaid() in (ROOT / "README.md").read_text(encoding="utf-8"), "see python -m tests.rooms --readme"


def test_our_import_names_are_ours_alone():
    owners = importlib.metadata.packages_distributions()
    assert set(owners.get("minilm", ["minilm-distiller"])) == {"minilm-distiller"}
    for name in (*PACKAGES, "recipes", "tests"):
        assert "minilm-distiller" not in owners.get(name, ())


def test_every_dependency_has_bounds_and_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = set().union(*(imported(p) for p in all_modules()))
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", requirement)[0]
        assert re.search(r">=.*<|==\S+", requirement), f"{requirement} has no bounds"
        assert IMPORT_NAMES.get(name, name.replace("-", "_")) in used, f"{name} is not used"


def test_data_is_never_ignored():
    """`data/` in an ignore file would be left out of Ray's upload, and workers would die without a data module."""
    for name in (".gitignore", ".dockerignore"):
        lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        assert not any(re.fullmatch(r"/?\**/?data/?\**", line) for line in lines)
