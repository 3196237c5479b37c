"""The files of a model's folder that go along when the model in it becomes another."""

from __future__ import annotations

import shutil
from pathlib import Path

from minilm.model.files import SUFFIXES, tokenizer_files


def copy_beside(folder: Path, part: Path, *, weights: bool, tokenizer: bool = True) -> None:
    """Copy what may lie in a model's folder to `part`, hidden files left out. weights: those of the encoder too (those
    of modules in folders in any case); tokenizer: its files too."""
    left = set() if tokenizer else set(tokenizer_files(folder))
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        own = name.parent == Path() and (file.suffix == ".safetensors" or file.name.endswith(".index.json"))
        if not file.is_file() or file.suffix not in SUFFIXES or file in left or (own and not weights):
            continue
        if any(step.startswith(".") for step in name.parts):
            continue
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, part / name)
