"""What a run was made from, as text: recipe values, package versions, the git commit. Knows no MLflow."""

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "minilm-distiller"
PACKAGES = ("torch", "transformers", "ray", "mlflow", "tokenizers", "numpy")


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as "a.b.c" -> text; a list of named mappings (stages, students) goes by their names."""
    flat: dict[str, str] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif (
            isinstance(value, list | tuple)
            and value
            and all(isinstance(v, Mapping) and "name" in v for v in value)
        ):
            flat |= flatten(
                {v["name"]: {k: x for k, x in v.items() if k != "name"} for v in value}, f"{name}."
            )
        elif isinstance(value, list | tuple):
            flat[name] = json.dumps(value, default=str)
        else:
            flat[name] = str(value)
    return flat


def package_tags() -> dict[str, str]:
    """The versions of Python and of `PACKAGES`, named "version.torch" and so on."""
    tags = {"version.python": platform.python_version()}
    return tags | {f"version.{package}": version for package, version in versions(PACKAGES).items()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Version by package, without packages that are not installed (ours need not be, in a checkout)."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the checkout that this code runs from, "+changes" if it has any; None outside a checkout."""
    folder = folder or Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None  # installed inside another project's checkout
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def code_version() -> dict[str, str]:
    """The versions of this project, its commit and the packages that compute; kept in every checkpoint."""
    code = versions((OURS, "torch", "transformers"))
    commit = git_commit()
    return code | ({"commit": commit} if commit else {})


def processor_name() -> str:
    """This machine's processor, as its maker calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
