"""The shape of the code: imports go one way, names are ours alone, dependencies are declared and used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("orchestrator", "model", "data")
MAY_IMPORT = {"orchestrator": {"data", "model"}, "model": set(), "data": set()}
# Heavy or replaceable libraries live at the edges, one file each.
ONLY_IN = {
    "ray": {f"orchestrator/{name}.py" for name in ("cluster", "launch", "places", "under_ray", "soak_arena")}
    | {"data/ray_tasks.py"},
    "mlflow": {f"orchestrator/{name}.py" for name in ("mlflow_server", "tracking", "registry")},
    "matplotlib": {"orchestrator/pictures.py", "data/report.py"},
    "pickle": set(),
}
IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}


def modules() -> list[Path]:
    return [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_from_orchestrator_to_data_and_model():
    for path in modules():
        room = path.relative_to(ROOT).parts[0]
        forbidden = imported(path) & (set(ROOMS) - MAY_IMPORT[room] - {room})
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_at_its_edge_only(library):
    found = {str(p.relative_to(ROOT)) for p in modules() if library in imported(p)}
    assert found <= ONLY_IN[library]


def test_loop_and_step_know_neither_ray_nor_mlflow():
    """Not even through another module of ours, imported when they are."""
    reached, todo = set(), ["orchestrator/worker.py", "orchestrator/step.py"]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS:
                candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = [c.replace(".", "/") + ".py" for c in candidates]
                todo += [f for f in files if (ROOT / f).exists()]
    assert "model/relations.py" in reached
    for name in reached:
        assert not imported(ROOT / name) & {"ray", "mlflow"}, name


def test_our_import_names_are_ours_alone():
    owners = importlib.metadata.packages_distributions()
    for name in (*ROOMS, "recipes"):
        assert set(owners.get(name, ["minilm-distiller"])) == {"minilm-distiller"}


def test_every_dependency_has_bounds_and_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = set().union(*(imported(p) for p in modules()))
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", requirement)[0]
        assert re.search(r">=.*<|==\S+", requirement), f"{requirement} has no bounds"
        assert IMPORT_NAMES.get(name, name.replace("-", "_")) in used, f"{name} is not used"


def test_data_is_never_ignored():
    """`data/` in an ignore file would be left out of Ray's upload, and workers would die without a data module."""
    for name in (".gitignore", ".dockerignore"):
        lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        assert not any(re.fullmatch(r"/?\**/?data/?\**", line) for line in lines)
