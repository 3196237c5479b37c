"""What may lie in a model's folder, and the digest of all of it.

A model is a plain transformers folder. Anything that could hold a pickle is refused, and so are links and names that
lead out of the folder. In the folder, the digest is what this says:

    find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from minilm.model.files import SUFFIXES
from minilm.orchestrator.errors import UserError


def folder_digest(folder: Path) -> str:
    """sha256 (hex) of the sorted lines "sha256-of-file  relative/path": what the command above prints."""
    lines = []
    for file in sorted(model_files(folder), key=os.fsencode):
        with (folder / file).open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_files(folder: Path) -> list[str]:
    """Relative paths of the files of a model folder; UserError if one of them has no business there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder that holds the model's config.json")
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    odd = [path for path in found if path.is_symlink() or not path.is_file()]
    if odd:
        raise UserError(f"{odd[0]} is a link or a device: a model folder holds plain files only")
    files = [path.relative_to(folder).as_posix() for path in found]
    refuse_pickles(files, str(folder))
    return files


def refuse_pickles(files: Iterable[str], where: str) -> None:
    """UserError for a file that leads out of the folder or is of another kind than those that are taken."""
    files = list(files)
    refuse_outside(files, where)
    for file in files:
        if not is_safe(file):
            raise UserError(
                f"{where} holds {file}: only {', '.join(SUFFIXES)} files are taken "
                "(never a pickle); save the weights as safetensors and leave other files out"
            )


def refuse_outside(files: Iterable[str], where: str) -> None:
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\n" in file:
            raise UserError(f"{where} names a file outside of itself ({file!r}): it is not to be trusted")


def is_safe(file: str) -> bool:
    return PurePosixPath(file).suffix in SUFFIXES
