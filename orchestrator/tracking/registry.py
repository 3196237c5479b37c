"""The model registry: a student's folder goes in, gets a version and an alias, and comes down again
unchanged.

A model is a plain transformers folder (config, safetensors, tokenizer, model card), stored in MLflow 3 as a
LoggedModel, with the files beside it by which MLflow's own commands load it (`mlflow_files`). Folders with anything
that could hold a pickle are refused both ways, and such that name code of their own are not taken. Every version
carries the digest of its folder as a tag, and `pull` checks it. An alias moves: `resolve` it once, keep
`RegisteredModel.uri`, which names the version.

Every function takes `store`, a tracking URI (`mlflow_server.tracking_uri`), and can be called again after any
death or with any server that was away for a while: registering is idempotent for the same run and the same
folder.
"""

import difflib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.tracking.calls import patiently
from minilm.orchestrator.tracking.client import connect, is_missing
from minilm.orchestrator.tracking.mlflow_files import is_mlflows, refuse_own_code, write_mlflow_files
from minilm.orchestrator.tracking.model_files import folder_digest, model_files

# isort: split
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

if TYPE_CHECKING:  # transformers takes a second to import
    from minilm.model.encoder.shape import EncoderShape

logger = logging.getLogger(__name__)


CARD = "README.md"


DIGEST_TAG = "minilm.digest"


_NEXT_DIGEST_TAG = "minilm.next_digest"  # of the folder with the card that is being put in place


RUN_TAG = "minilm.run_id"


_ALIASED_TAG = "minilm.aliased"


_BY_HAND_TAG = "minilm.registered"


_MAX_DESCRIPTION = 2000  # characters: MLflow takes 5,000, and a page wants fewer


_IMPOSSIBLE_TAG = {"minilm.may-register?": ""}


_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


Result = TypeVar("Result")


@dataclass(frozen=True)
class RegisteredModel:
    """One version in the registry.

    alias: the one it was asked for or registered with, None if it was asked for by number. uri: names the
    version, so it never moves. digest: of the folder, None for a model that this project did not register;
    next_digest: while its card is being replaced.
    """

    name: str
    version: int
    alias: str | None
    uri: str
    digest: str | None
    next_digest: str | None = None


def register(
    store: str,
    name: str,
    folder: Path,
    *,
    run_id: str,
    alias: str,
    tags: Mapping[str, str] | None = None,
    patience_seconds: float = 60.0,
) -> RegisteredModel:
    """Stores a transformers folder as a new version of `name` and points the alias to it.

    The same folder from the same run (run_id: the stage's) gets the version it has already; then the alias
    is left where somebody may have moved it since. Identical folders of two runs are two versions: each run
    has its own. The version's page shows the head of the folder's README.md. UserError: a file that does not
    belong in such a folder, a bad name or alias. InfrastructureError: the store was away for
    `patience_seconds`; here as in every function below.
    """
    files = model_files(folder)
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{folder} is no model: it has no config.json or no safetensors weights; export one there"
        )
    if taken := [file for file in files if is_mlflows(file)]:
        raise UserError(f"{folder} holds {taken[0]}, which MLflow has a file of its own for; leave it out")
    refuse_own_code(folder)
    digest = folder_digest(folder)

    def attempt(client: MlflowClient) -> RegisteredModel:
        if not _is_registered(client, name):
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        version = _find_version(client, name, digest, run_id)
        if version is None:
            model = _logged_model(client, name, folder, digest, run_id, tags or {})
            all_tags = {**(tags or {}), DIGEST_TAG: digest}
            version = client.create_model_version(
                name,
                model.artifact_location,
                run_id,
                tags=all_tags,
                description=card_head(folder / CARD),
                model_id=model.model_id,
                await_creation_for=0,  # MLflow's own stores have it ready at once
            )
            link = json.dumps([{"name": name, "version": int(version.version)}])
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})  # as MLflow does
        if version.tags.get(_ALIASED_TAG) != alias:
            client.set_registered_model_alias(name, alias, str(version.version))
            client.set_model_version_tag(name, str(version.version), _ALIASED_TAG, alias)
        return _registered(version, alias)

    return _patiently(store, attempt, patience_seconds)


def replace_card(
    store: str, model: RegisteredModel, folder: Path, *, patience_seconds: float = 60.0
) -> RegisteredModel:
    """Put the README.md of `folder` into the place of the version's, and its head onto the version's page.

    The other files are those that were registered. A pull meanwhile gets either card. Can be repeated.
    """
    digest, name, number = folder_digest(folder), model.name, str(model.version)

    def attempt(client: MlflowClient) -> RegisteredModel:
        version = client.get_model_version(name, number)
        if version.tags.get(DIGEST_TAG) != digest:
            client.set_model_version_tag(name, number, _NEXT_DIGEST_TAG, digest)
            repository = get_artifact_repository(
                client.get_model_version_download_uri(name, number), tracking_uri=store
            )
            repository.log_artifact(str(folder / CARD))
            client.update_model_version(name, number, description=card_head(folder / CARD))
            if logged := find_logged_model(client, version.run_id, version.tags.get(DIGEST_TAG)):
                client.set_logged_model_tags(logged.model_id, {DIGEST_TAG: digest})
            client.set_model_version_tag(name, number, DIGEST_TAG, digest)
        if _NEXT_DIGEST_TAG in version.tags or version.tags.get(DIGEST_TAG) != digest:
            client.delete_model_version_tag(name, number, _NEXT_DIGEST_TAG)
        return _registered(client.get_model_version(name, number), model.alias)

    return _patiently(store, attempt, patience_seconds)


def make_run(store: str, name: str, folder: Path, *, experiment: str, patience_seconds: float = 60.0) -> str:
    """The id of a run that stands for `folder` having been registered by hand, for `register`; the same one again.

    A store that is a file is made if it is not there, with the experiment's files beside it.
    """
    tags = {_BY_HAND_TAG: name, DIGEST_TAG: folder_digest(folder), "mlflow.source.name": "minilm register"}

    def attempt() -> str:
        client = connect(store)
        query = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (_BY_HAND_TAG, DIGEST_TAG))
        experiment_id = _experiment(client, store, experiment)
        if found := client.search_runs([experiment_id], query, max_results=1):
            return str(found[0].info.run_id)
        run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        client.set_terminated(run_id)
        return str(run_id)

    return patiently(store, attempt, patience_seconds)


def check_rights(store: str, names: Iterable[str], *, patience_seconds: float = 10.0) -> None:
    """UserError where no version of one of these models may be registered, or its name is none; registers nothing.

    It asks for each, with a tag that MLflow does not take: a server looks at rights before it looks at tags.
    """

    def attempt(name: str) -> None:
        client = connect(store)
        try:
            if _is_registered(client, name):
                client.create_model_version(name, "none", tags=_IMPOSSIBLE_TAG, await_creation_for=0)
            else:
                client.create_registered_model(name, tags=_IMPOSSIBLE_TAG)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or "model name" in str(error):
                raise

    for name in names:
        try:
            patiently(store, partial(attempt, name), patience_seconds)
        except InfrastructureError:
            raise
        except UserError as error:
            raise UserError(f"model {name!r} can't be registered: {error}") from error


def resolve(store: str, uri: str, *, patience_seconds: float = 10.0) -> RegisteredModel:
    """What models:/NAME@ALIAS or models:/NAME/VERSION is now; UserError names what there is instead."""
    return _patiently(store, lambda client: _resolve(client, uri), patience_seconds)


def promote(
    store: str, name: str, version: int, alias: str, *, patience_seconds: float = 10.0
) -> RegisteredModel:
    """Points an alias to a version that exists; UserError names what there is instead."""

    def attempt(client: MlflowClient) -> RegisteredModel:
        found = _resolve(client, f"models:/{name}/{version}")
        client.set_registered_model_alias(name, alias, str(version))
        return RegisteredModel(name, version, alias, found.uri, found.digest)

    return _patiently(store, attempt, patience_seconds)


def _is_registered(client: MlflowClient, name: str) -> bool:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _find_version(client: MlflowClient, name: str, digest: str, run_id: str) -> ModelVersion | None:
    found = client.search_model_versions(
        f"name = '{name}' and run_id = '{run_id}' and tags.`{DIGEST_TAG}` = '{digest}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)


def _logged_model(
    client: MlflowClient, name: str, folder: Path, digest: str, run_id: str, tags: Mapping[str, str]
) -> LoggedModel:
    """The LoggedModel with these files, one that a dead driver completed or a new one."""
    experiment_id = client.get_run(run_id).info.experiment_id
    query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`{RUN_TAG}` = '{run_id}'"
    for model in client.search_logged_models([experiment_id], query):
        if model.status == LoggedModelStatus.READY:
            return model
        client.delete_logged_model(model.model_id)  # its upload was cut short
    model = client.create_logged_model(
        experiment_id,
        re.sub(r"[^\w-]", "-", name),
        run_id,
        tags={**tags, DIGEST_TAG: digest, RUN_TAG: run_id},
        model_type="transformers-folder",
    )
    client.log_model_artifacts(model.model_id, str(folder))
    with tempfile.TemporaryDirectory() as beside:
        write_mlflow_files(folder, Path(beside), model_id=model.model_id, run_id=run_id)
        client.log_model_artifacts(model.model_id, beside)
    model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])  # shown on the run's page
    return model


def find_logged_model(client: MlflowClient, run_id: str, digest: str | None) -> LoggedModel | None:
    """The LoggedModel that `register` made for this folder; not every store's version names it."""
    experiment_id = client.get_run(run_id).info.experiment_id
    query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`{RUN_TAG}` = '{run_id}'"
    found = client.search_logged_models([experiment_id], query)
    return found[0] if found else None


def _experiment(client: MlflowClient, store: str, name: str) -> str:
    """The id of an experiment, made if it is new; where the store is a file, with its files beside it."""
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    path = store.removeprefix("sqlite:///").partition("?")[0]
    beside = (Path(path).resolve().parent / "mlartifacts").as_uri() if store.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=beside))


def shape_tags(shape: "EncoderShape", parameters: int) -> dict[str, str]:
    """Tags by which people look for a model."""
    return {
        "minilm.architecture": shape.architecture,
        "minilm.layers": str(shape.layers),
        "minilm.hidden": str(shape.hidden),
        "minilm.heads": str(shape.heads),
        "minilm.parameters": str(parameters),
    }


def card_head(card: Path) -> str:
    """The first lines of a model card, Markdown: what stands before its second heading, without front matter."""
    if not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    head = re.split(r"\n(?=#)", text, maxsplit=1)[0]
    return head[:_MAX_DESCRIPTION].strip()


def _resolve(client: MlflowClient, uri: str) -> RegisteredModel:
    match = _URI.fullmatch(uri)
    if match is None:
        raise UserError(
            f"{uri!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name, alias, number = match["name"], match["alias"], match["version"]
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models(max_results=100)]
        raise UserError(f"no model {name!r} is registered; {_instead(name, names, 'registered')}") from error
    if alias is not None:
        if alias not in aliases:
            raise UserError(f"model {name!r} has no alias {alias!r}; {_instead(alias, aliases, 'aliases')}")
        number = aliases[alias]
    try:
        return _registered(client.get_model_version(name, str(number)), alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.search_model_versions(f"name = '{name}'")
        versions = sorted(int(version.version) for version in found)
        there = f"its versions: {', '.join(map(str, versions)) or 'none'}"
        raise UserError(f"model {name!r} has no version {number}; {there}") from error


def _instead(given: str, there: Iterable[str], what: str) -> str:
    names = sorted(there)
    close = difflib.get_close_matches(given, names, n=1)
    listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"did you mean {close[0]!r}? ({what}: {listed})" if close else f"{what}: {listed or 'none'}"


def _registered(version: ModelVersion, alias: str | None) -> RegisteredModel:
    uri = f"models:/{version.name}/{version.version}"
    digests = (version.tags.get(tag) for tag in (DIGEST_TAG, _NEXT_DIGEST_TAG))
    return RegisteredModel(version.name, int(version.version), alias, uri, *digests)


def _patiently(store: str, attempt: Callable[[MlflowClient], Result], patience_seconds: float) -> Result:
    if is_missing(store):
        database = store.removeprefix("sqlite:///")
        raise UserError(
            f"there is no {database}: name the work directory of a run, or set MLFLOW_TRACKING_URI"
        )
    return patiently(store, lambda: attempt(connect(store)), patience_seconds)
