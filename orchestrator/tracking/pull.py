"""A registered model as a folder: whole or absent."""

import errno
import os
import re
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path

from minilm.data.format.files import fsync_path
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.text import one_line
from minilm.orchestrator.tracking.foreign_models import plain_folder
from minilm.orchestrator.tracking.mlflow_files import is_mlflows
from minilm.orchestrator.tracking.model_files import folder_digest, model_files, refuse_pickles

# isort: split
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from minilm.orchestrator.tracking.registry import RegisteredModel, _patiently, logger, resolve


def pull(store: str, uri: str, out: Path, *, patience_seconds: float = 10.0) -> RegisteredModel:
    """Downloads a model to the folder `out`, which must be empty or absent; it appears whole and checked,
    or not at all. (The current folder can't be swapped under a shell: it is filled, config.json last.)

    Of a model that others registered (without a digest) come only the files that make a plain transformers folder
    (see `foreign_models`). UserError: something is in `out`, no such model, a file in it that could hold a pickle,
    other bytes than were registered, no space.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder, or remove it first")
    model = resolve(store, uri, patience_seconds=patience_seconds)
    out = out.absolute()  # "." has no name to put the part beside
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} can't be made ({one_line(error)}): choose another folder") from error
    try:
        _patiently(store, lambda client: _download(client, store, model, part), patience_seconds)
        if out.exists() and out.samefile("."):  # replaced, the caller's shell would sit in a removed folder
            for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(out / path.name)
        else:
            part.replace(out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return model


def pull_once(store: str, uri: str, folder: Path, *, patience_seconds: float = 60.0) -> Path:
    """The model as folder/NAME-vVERSION, downloaded unless it is there and unchanged.

    What an alias meant the first time is written beside it and stays so for this folder: a resumed run has
    the teacher it began with, and needs no server for it.
    """
    pin = folder / (re.sub(r"[^\w@-]", "-", uri.removeprefix("models:/")) + ".json")
    pinned = read_json(pin)
    if pinned is None:
        model = resolve(store, uri, patience_seconds=patience_seconds)
        write_json(pin, asdict(model))
    else:
        model = RegisteredModel(**pinned)
    out = folder / f"{model.name}-v{model.version}"
    if out.is_dir() and any(out.iterdir()):
        if model.digest in (None, folder_digest(out)):
            return out
        logger.warning("%s has changed since it was downloaded: downloading it again", out)
        shutil.rmtree(out)
    pull(store, model.uri, out, patience_seconds=patience_seconds)
    return out


def _download(client: MlflowClient, store: str, model: RegisteredModel, part: Path) -> None:
    source = client.get_model_version_download_uri(model.name, str(model.version))
    repository = get_artifact_repository(source, tracking_uri=store)
    files: list[str] = []
    folders = [""]
    while folders:
        for entry in repository.list_artifacts(folders.pop() or None):
            (folders if entry.is_dir else files).append(entry.path)
    if not files:
        raise UserError(
            f"{model.uri} has no files at {source}: register it again, or pull it where it was made"
        )
    try:
        if model.digest is None:  # somebody else's
            raw = part / "raw"
            raw.mkdir(exist_ok=True)
            for file, name in plain_folder(files, model.uri).items():
                repository.download_artifacts(file, dst_path=str(raw))
                (raw / file).replace(part / name)
            shutil.rmtree(raw)
        else:
            own = [file for file in files if not is_mlflows(file)]
            refuse_pickles(own, model.uri)
            for file in own:
                repository.download_artifacts(file, dst_path=str(part))
        for file in model_files(part):
            with (part / file).open("rb") as stream:
                os.fsync(stream.fileno())
    except (OSError, MlflowException) as error:  # MLflow wraps what its download threads raise
        if os.strerror(errno.ENOSPC) in str(error):
            raise UserError(
                f"no space for {model.uri} in {part.parent}: make room, or pull elsewhere"
            ) from error
        raise
    found = folder_digest(part)
    if model.digest is None:
        logger.warning(
            "%s was not registered by this project: it has no digest to check it against, what came down is %s",
            model.uri,
            found,
        )
    elif found not in (model.digest, model.next_digest):
        raise UserError(
            f"{model.uri} is not what was registered: digest {found}, registered {model.digest}; "
            "its files were changed in the store, so register it again"
        )
