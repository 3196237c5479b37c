"""The files of a model's folder that go along when the model in it becomes another."""

from __future__ import annotations

import shutil
from pathlib import Path

from minilm.model.files import SUFFIXES, tokenizer_files


def copy_beside(folder: Path, part: Path, *, weights: bool, tokenizer: bool = True) -> None:
    """Copy what belongs to a model from its folder to `part`: its own files, its modules' (as 1_Pooling/) and its
    tokenizer's; hidden files and other folders, such as checkpoints, are left out.

    weights: those of the encoder too (those of modules in any case); tokenizer: its files too.
    """
    of_tokenizer = set(tokenizer_files(folder))
    left = set() if tokenizer else of_tokenizer
    for file in sorted({*folder.glob("*"), *folder.glob("[0-9]*_*/*"), *of_tokenizer}):
        name = file.relative_to(folder)
        own = name.parent == Path() and (file.suffix == ".safetensors" or file.name.endswith(".index.json"))
        if not file.is_file() or file.suffix not in SUFFIXES or file in left or (own and not weights):
            continue
        if any(step.startswith(".") for step in name.parts):
            continue
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, part / name)
