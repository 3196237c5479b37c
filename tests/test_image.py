"""The image: its steps in a fresh environment, and its lock. No builder of images is at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.lock import COMPANIONS
from tests.rooms import ROOT


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if re.match("[A-Z]", line)]


def locked() -> dict[str, Version]:
    """The versions in requirements.lock by package."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in pins}


def test_the_lock_holds_what_the_project_asks_for():
    """Within its bounds; `make lock` writes it anew. That it holds the rest too, the test below shows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = locked()
    for text in project["dependencies"] + project["optional-dependencies"]["remote"]:
        requirement = Requirement(text)
        assert requirement.name in pins, f"{requirement.name} is not locked: make lock"
        assert requirement.specifier.contains(pins[requirement.name]), text


def test_code_comes_after_its_dependencies_and_an_ordinary_user_last():
    steps = [f"{name} {text}" for name, text in instructions()]
    places = [
        next(number for number, step in enumerate(steps) if step.startswith(start))
        for start in (
            "COPY requirements.lock",
            "RUN python -m pip install --no-cache-dir --req",
            "COPY minilm",
        )
    ]
    assert places == sorted(places)
    assert [step for step in steps if step.startswith("USER")] == ["USER 1000"]
    assert not any(re.search(r"\bgit\b", step) for step in steps)
    copied = {text.split()[0] for name, text in instructions() if name == "COPY"}
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_the_image_installs_checks_every_packaged_recipe_from_an_empty_folder(tmp_path):
    """Its steps from the first `COPY` on, in an environment of their own instead of a container."""
    environment, app, empty = tmp_path / "environment", tmp_path / "app", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    app.mkdir()
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    shell = {"env": kept | {"PATH": f"{environment / 'bin'}{os.pathsep}{kept['PATH']}", "TORCH_OPTIONS": ""}}
    for name, text in instructions():
        if name == "COPY":
            *sources, _ = text.split()
            for source in sources:
                copy(ROOT / source, app / source)
        elif name == "RUN" and "pip" in text:
            subprocess.run(["sh", "-c", text], cwd=app, check=True, **shell)
    shutil.rmtree(app)
    freeze = ["python", "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(freeze, check=True, capture_output=True, text=True, **shell).stdout)
    installed = {canonicalize_name(item["name"]): Version(item["version"]).public for item in listed}
    extra = {name for name in installed if not COMPANIONS.match(name)} - set(locked())
    assert extra <= {"pip", "setuptools"}, "packages that no lock pins"
    assert all(installed[name] == str(version) for name, version in locked().items())
    code = "import minilm.recipes as r, pathlib; print(*pathlib.Path(r.__path__[0]).glob('*.yaml'))"
    found = subprocess.run(
        ["python", "-c", code], cwd=empty, check=True, capture_output=True, text=True, **shell
    )
    recipes = found.stdout.split()
    assert len(recipes) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert all(Path(recipe).is_relative_to(environment) for recipe in recipes)
    done = subprocess.run(
        ["minilm", "check", *recipes], cwd=empty, capture_output=True, text=True, check=False, **shell
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": sound") == len(recipes)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
