"""The rooms of the code, and what each may import: the one list behind the test, the README's picture and the report.

python -m tests.rooms             modules and lines by room, every arrow between rooms, circles and breaches
python -m tests.rooms --mermaid   the picture in the README
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "model", "data")
# A room is a folder of a package, or a file that lies in the package itself. Of other packages, only `orchestrator`
# may import any.
MAY_IMPORT = {
    "orchestrator": {
        "errors": "",
        "system": "errors",
        "stage": "",
        "recipe": "errors stage evaluation",
        "train": "errors stage",
        "feed": "errors stage train",
        "checkpoint": "errors system stage train",
        "evaluation": "errors system stage train feed",
        "worker": "errors system stage train feed checkpoint evaluation",
        "deploy": "errors system evaluation",
        "tracking": "errors system stage",
        "launch": "errors system stage checkpoint worker",
        "resolve": "errors system recipe stage feed evaluation tracking",
        "plan": "errors system recipe resolve",
        "driver": "errors system stage recipe train feed checkpoint worker evaluation tracking launch resolve plan",
        "bench": "errors system stage recipe train feed checkpoint worker resolve plan driver",
        "verbs": "errors system stage recipe feed train worker evaluation deploy tracking launch resolve plan"
        " driver bench",
        "cli": "errors verbs",
    },
    "data": {
        "errors": "",
        "tokenizer": "errors",
        "vocabulary": "errors",
        "token_match": "errors tokenizer",
        "format": "errors",
        "order": "errors",
        "storage": "errors format",
        "records": "errors",
        "sources": "errors tokenizer format storage records",
        "read": "errors tokenizer format storage sources",
        "builder": "errors tokenizer format storage sources",
        "stream": "errors format order read",
        "open": "errors storage read",
        "torch_dataset": "errors read stream",
        "tools": "errors tokenizer format order storage read builder stream open",
    },
    "model": {
        "errors": "",
        "files": "",
        "encoder": "errors files kernels",
        "kernels": "errors",
        "loss": "errors encoder kernels",
        "compatibility": "errors encoder loss",
        "distiller": "errors encoder loss compatibility",
        "export": "errors files encoder",
    },
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("minilm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def module_file(name: str) -> Path | None:
    """The file of `minilm.…`, None where the name is none of a module."""
    path = ROOT.joinpath(*name.split(".")[1:])
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def imported_files(path: Path) -> set[Path]:
    """The files of ours that a file imports, in functions and under TYPE_CHECKING too."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if module_file(name) else node.module for name in names]
        else:
            continue
        found |= {file for name in names if name.startswith("minilm.") and (file := module_file(name))}
    return found - {path}


def room_of(path: Path) -> tuple[str, str]:
    """(package, room); the package itself where the file is its `__init__.py`."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return package, "" if rest[0] == "__init__" else rest[0]


def arrows() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """The rooms that each room imports."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for package in PACKAGES:
        for path in modules(package):
            own = room_of(path)
            found[own] |= {room_of(other) for other in imported_files(path)} - {own}
    return found


def breaches() -> list[str]:
    """Every import against the order, a line each."""
    lines = []
    for package in PACKAGES:
        for path in modules(package):
            own_package, own = room_of(path)
            for other in sorted(imported_files(path)):
                to_package, room = room_of(other)
                if to_package != own_package:
                    allowed = own_package == "orchestrator"
                elif room == own or path.name == "__init__.py":
                    allowed = room == own
                else:
                    allowed = room in MAY_IMPORT[own_package].get(own, "").split()
                if not allowed:
                    lines.append(f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}")
    return lines


def circle(graph: dict) -> list | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def file_graph() -> dict[str, set[str]]:
    return {
        module_name(path): {module_name(other) for other in imported_files(path)}
        for package in PACKAGES
        for path in modules(package)
    }


def report() -> str:
    lines = []
    for package in PACKAGES:
        by_room: dict[str, list[Path]] = defaultdict(list)
        for path in modules(package):
            by_room[room_of(path)[1]].append(path)
        for room, paths in by_room.items():
            count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
            to = sorted(".".join(other) for other in arrows()[package, room])
            lines.append(
                f"{package + '.' + room:24}{len(paths):>4} modules{count:>7} lines  → {', '.join(to) or '-'}"
            )
    graph = file_graph()
    lines += [
        f"{len(graph)} modules, {sum(map(len, graph.values()))} imports",
        f"circle of files: {circle(graph) or 'none'}",
        f"circle of rooms: {circle(arrows()) or 'none'}",
        f"imports against the order: {breaches() or 'none'}",
    ]
    return "\n".join(lines)


def mermaid() -> str:
    """The rooms as a picture: an arrow from each room to those of its allowed imports that no other arrow implies."""
    lines = ["graph BT"]
    for package in PACKAGES:
        allowed = {room: set(names.split()) - {"errors"} for room, names in MAY_IMPORT[package].items()}
        reached: dict[str, set[str]] = {}
        for room in TopologicalSorter(allowed).static_order():
            reached[room] = allowed.get(room, set()).union(*(reached[r] for r in allowed.get(room, ())))
        lines.append(f"  subgraph {package}")
        for room, below in allowed.items():
            if room == "errors":
                continue
            lines.append(f"    {package}.{room}[{room}]")
            near = sorted(b for b in below if not any(b in reached[other] for other in below))
            lines += [f"    {package}.{room} --> {package}.{other}" for other in near]
        lines.append("  end")
    lines += ["  orchestrator --> model", "  orchestrator --> data"]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--readme" in sys.argv[1:]:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition("```mermaid\n")
        readme.write_text(f"{before}```mermaid\n{mermaid()}\n```{rest.partition('```')[2]}", encoding="utf-8")
    else:
        print(report())
