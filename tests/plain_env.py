"""A second virtual environment with transformers, torch, mlflow and what they need, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def make_plain_env(folder: Path) -> Path:
    """Its Python. The packages are links to those of this environment, found by what they say that they need."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed_by("transformers", "torch", "mlflow"):
        found = distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        for command in found.entry_points.select(group="console_scripts"):
            script = folder / "bin" / command.name
            script.write_text(
                f"#!{folder}/bin/python\nimport sys\nfrom {command.module} import {command.attr}\n"
                f"sys.exit({command.attr}())\n"
            )
            script.chmod(0o755)
    return folder / "bin" / "python"


def needed_by(*names: str) -> set[str]:
    """Names of the distributions that `names` need, themselves too; extras and what is not installed left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or ()
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [
            re.split(r"[^\w.-]", text, maxsplit=1)[0].lower() for text in requires if "extra ==" not in text
        ]
    return found
