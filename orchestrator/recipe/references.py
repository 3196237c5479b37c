"""What a recipe's `teacher:` or `tokenizer:` points to, and where the files it names lie.

    assistant                     a student of an earlier stage
    models:/NAME@ALIAS            a registered model, by alias …
    models:/NAME/VERSION          … or by version
    package:IMPORT_NAME/path      a folder inside an installed package (found, never imported)
    /abs  ./rel  ../rel  ~/home   a folder
    OWNER/NAME                    a model of the Hugging Face hub

Leaves out fetching: nothing here touches the network, the registry or the content of a file.
"""

import importlib.util
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from minilm.orchestrator.errors import UserError

FORMS = (
    "an earlier student's name, models:/NAME@ALIAS, models:/NAME/VERSION, package:IMPORT_NAME/PATH, "
    "a folder (/…, ./…, ../…, ~/…) or a hub id OWNER/NAME"
)
_REGISTRY = re.compile(r"models:/[^/@:]+(?:@[^/@:]+|/[1-9][0-9]*)")
_PACKAGE = re.compile(r"package:(?P<package>[A-Za-z_]\w*)(?:/(?P<inside>.+))?")
VARIABLE = re.compile(r"\$(\{[^}]*\}|[A-Za-z_]\w*)")  # what is left of variables: no value has any
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class StudentRef:
    """A student of an earlier stage of the same recipe."""

    name: str


@dataclass(frozen=True)
class RegistryRef:
    """A registered model: models:/NAME@ALIAS or models:/NAME/VERSION."""

    uri: str


@dataclass(frozen=True)
class FolderRef:
    """A folder on this machine; it need not exist."""

    path: Path


@dataclass(frozen=True)
class HubRef:
    """A model of the Hugging Face hub."""

    id: str


Reference = StudentRef | RegistryRef | FolderRef | HubRef


def parse_reference(text: str, students: Collection[str] = ()) -> Reference:
    """The reference that `text` writes; a name in `students` wins over a folder or hub id of that name.

    Raises UserError for a form that does not exist and for a package that is not installed.
    """
    if text in students:
        return StudentRef(text)
    if text.startswith("models:"):
        if not _REGISTRY.fullmatch(text):
            raise UserError(f"given {text!r}; allowed: models:/NAME@ALIAS or models:/NAME/VERSION")
        return RegistryRef(text)
    if text.startswith("package:"):
        return FolderRef(package_path(text))
    if looks_like_path(text):
        return FolderRef(expanded(text))
    if _HUB.fullmatch(text):
        return HubRef(text)
    raise UserError(f"given {text!r}; allowed: {FORMS}")


def check_form(text: str) -> None:
    """Raises UserError if `text` has none of the forms above. An absent package is no fault of form."""
    if text.startswith("package:"):
        _split_package(text)
    else:
        parse_reference(text)


def looks_like_path(text: str) -> bool:
    """Whether `text` can only be a path: a hub id has one slash at most and begins with its owner."""
    if "://" in text or text.startswith(("models:", "package:")):
        return False
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.strip("/").count("/") > 1


def expanded(text: str) -> Path:
    """The path with `~` and `~USER` replaced; of a user that this machine has not, as it is: such a path is missing."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser raises there)


def package_path(text: str) -> Path:
    """Where `package:IMPORT_NAME/path` lies. Raises UserError if the package is not installed.

    Only the top-level name is looked up: looking up a dotted one would import its parent.
    """
    package, inside = _split_package(text)
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that runs as a script has no spec
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        raise UserError(
            f"given {text!r}, but no package {package!r} is installed in this Python: "
            f"install it (pip install --no-deps {package.replace('_', '-')})"
        )
    paths = [folder / inside for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def absent_package(text: str) -> str | None:
    """What is wrong with `text` if it names a package that is not installed."""
    try:
        if text.startswith("package:"):
            package_path(text)
    except UserError as error:
        return str(error)
    return None


def _split_package(text: str) -> tuple[str, str]:
    match = _PACKAGE.fullmatch(text)
    inside = (match["inside"] or "") if match else ""
    if not match or ".." in Path(inside).parts or inside.startswith("/"):
        raise UserError(f"given {text!r}; allowed: package:IMPORT_NAME/PATH with a PATH inside the package")
    return match["package"], inside
