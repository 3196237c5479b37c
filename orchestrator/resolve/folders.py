"""References become folders: registry URIs, hub ids, packages, earlier students."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minilm.model.files import ADAPTER, SUFFIXES, to_safetensors
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.references import (
    FolderRef,
    HubRef,
    Reference,
    RegistryRef,
    StudentRef,
    absent_package,
    package_path,
    parse_reference,
)
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.text import one_line

HUB_FILES = [f"*{suffix}" for suffix in SUFFIXES]


def model_folder(ref: Reference, workdir: RunFolder, recipe: Recipe | None = None) -> Path:
    """The folder of a teacher, a tokenizer or any other model. Raises `UserError` when it can't be had.

    recipe: needed for a student of an earlier stage, which has no other name.
    """
    match ref:
        case FolderRef(path):
            return _checked(path)
        case StudentRef(name):
            assert recipe is not None
            stage = next(s for s in recipe.stages if any(student.name == name for student in s.students))
            return workdir.stage(stage.name).student(name).resolve()
        case RegistryRef():
            from minilm.orchestrator.tracking.client import is_missing, tracking_uri
            from minilm.orchestrator.tracking.pull import pull_once

            store = tracking_uri(workdir.root)
            try:
                return pull_once(store, ref.uri, workdir.teachers).resolve()
            except UserError as error:
                if not is_missing(store):
                    raise
                raise UserError(
                    f"{ref.uri} was to come from this work directory's own registry, and there is no "
                    f"{store.removeprefix('sqlite:///')}; set MLFLOW_TRACKING_URI to where the model is registered, "
                    f"or bring it down (`minilm pull {ref.uri} DIR --workdir OTHER`) and give the folder instead"
                ) from error
        case HubRef(hub_id):
            return download(hub_id, workdir.teachers)


def folder_here(text: str) -> str | None:
    """The folder of the teacher or tokenizer that `text` refers to, where it is on this machine; None for one that a
    run would fetch, or that is missing. Raises `UserError` for a folder that holds no model."""
    if absent_package(text):
        return None
    ref = parse_reference(text)
    return str(_checked(ref.path)) if isinstance(ref, FolderRef) and ref.path.is_dir() else None


def _checked(path: Path) -> Path:
    if (path / ADAPTER).exists() and not (path / "config.json").exists():
        raise UserError(
            f"{path} is an adapter ({ADAPTER}) without its model; merge it into the model that it was trained on "
            f"(merge_and_unload of peft, then save_pretrained) and give that folder"
        )
    if not (path / "config.json").exists() and not (path / "tokenizer.json").exists():
        raise UserError(
            f"{path} is not a model folder (no config.json in it); give a transformers folder, a hub id, "
            f"models:/NAME@ALIAS, package:NAME/PATH or an earlier student's name"
        )
    return path.resolve()


def text_inputs(patterns: Sequence[str]) -> list[str | Path]:
    """What `builder.build` is given for paths, folders, globs and `package:NAME/PATH`."""
    return [package_path(p) if p.startswith("package:") else p for p in patterns]


def tokenizer_name(text: str) -> str:
    """A folder or hub id that `data build` can load a tokenizer from, for a reference given on the command line."""
    match parse_reference(text):
        case FolderRef(path):
            return str(path.absolute())  # `./name` without its dot would be a hub id
        case HubRef(hub_id):
            return hub_id if not Path(hub_id).is_dir() else str(Path(hub_id).resolve())
        case ref:
            raise UserError(
                f"--tokenizer {text}: a {type(ref).__name__} can't be used here; give a folder, package:NAME/PATH or a "
                f"hub id (`minilm pull` brings a registered model down)"
            )


def download(hub_id: str, teachers: Path) -> Path:
    """A hub model's files as a folder under `teachers`: whole or absent, and not asked for again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import HFValidationError

    folder = teachers / hub_id.replace("/", "--")
    if folder.exists():
        return folder.resolve()
    part = folder.with_name(f"{folder.name}.part")  # kept after a kill: the download goes on in it
    problem = ""
    try:
        snapshot_download(hub_id, local_dir=part, allow_patterns=HUB_FILES)
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HFValidationError,
        OSError,
    ) as error:
        problem = one_line(error)
    except Exception as error:  # the hub's HTTP client has exceptions of its own for a lost connection
        if "http" not in type(error).__module__:
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"
    if not problem and not ((part / "config.json").exists() and any(part.glob("*.safetensors"))):
        raise UserError(
            f"model {hub_id} has no config.json with a model.safetensors; where its weights are a pickle, "
            f"pytorch_model.bin, bring it down and make a model.safetensors of it: "
            f"hf download {hub_id} --local-dir DIR && {to_safetensors('DIR')}; then give DIR"
        )
    if problem:
        raise UserError(
            f"model {hub_id} cannot be downloaded ({problem}); check the id and the network, "
            f"or give a local folder instead"
        )
    part.rename(folder)
    return folder.resolve()
