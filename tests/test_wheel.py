"""The wheel: one import name, every module of every room, and a run from it in a folder of the user's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.rooms import PACKAGES, ROOT, module_name, modules
from tests.support import crowded_folder
from tests.test_driver_curriculum import write_recipe

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
IMPORT_ALL = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[2:]]))
"""


def build_wheel(out: Path, copy: Path) -> Path:
    """The wheel, in `out`; built from a copy of the checkout."""
    for name in (*PACKAGES, "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "minilm", copy / "minilm", symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True, check=True
    )
    return out / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts into site-packages."""
    site = tmp_path_factory.mktemp("site")
    built = build_wheel(tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("work") / "checkout")
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(site)
    return site


def test_nothing_but_minilm_is_installed(installed):
    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["minilm"]
    assert not any(path.is_symlink() for path in installed.rglob("*"))
    shipped = {path.name for path in (installed / "minilm" / "recipes").iterdir()}
    assert shipped == {path.name for path in (ROOT / "recipes").iterdir() if path.is_file()}


def test_every_module_is_in_it_and_can_be_imported(installed, tmp_path):
    names = sorted({module_name(path) for package in PACKAGES for path in modules(package)})
    names = [name for name in names if not name.startswith("minilm.model.kernels.")]  # where there is Triton
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(installed), *names, "minilm.recipes"]
    done = subprocess.run(command, cwd=crowded_folder(tmp_path), capture_output=True, text=True, check=True)
    files = json.loads(done.stdout)
    assert len(files) > 150 and all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.slow
def test_it_checks_and_runs_recipes_in_a_folder_with_files_of_our_names(installed, tmp_path, text, teacher):
    folder = crowded_folder(tmp_path / "user")
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "MLFLOW_TRACKING_URI": "",
        "PYTHONSAFEPATH": "1",
    }

    def minilm(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "minilm", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart.yaml: sound" in minilm("check", *(installed / "minilm" / "recipes").glob("*.yaml"))
    recipe = write_recipe(folder, text, teacher)
    few = [
        f"stages.{stage}.{value}"
        for stage in ("assistant", "small")
        for value in ("steps=4", "warmup_steps=1")
    ]
    changes = [word for change in few for word in ("--set", change)]
    assert "tiny-small v1" in minilm("run", recipe, "--launcher", "inline", "--workdir", "work", *changes)
