"""`minilm pull` and `minilm promote`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_verb


def add_pull(verbs: Any) -> None:
    pull = add_verb(
        verbs,
        "pull",
        "bring a registered model down",
        "minilm pull models:/quickstart-student@newest student --workdir runs/quickstart",
        "MLFLOW_TRACKING_URI=http://mlflow:5000 minilm pull models:/quickstart-student/1 student",
    )
    pull.add_argument("uri", metavar="models:/NAME@ALIAS")
    pull.add_argument("out", type=Path, metavar="DIR")
    pull.add_argument("--workdir", type=Path, help="take it from this work directory's own registry")
    pull.set_defaults(run=pull_model)


def add_promote(verbs: Any) -> None:
    promote = add_verb(
        verbs,
        "promote",
        "point an alias to a version of a registered model",
        "minilm promote models:/quickstart-student/1 good --workdir runs/quickstart",
    )
    promote.add_argument("uri", metavar="models:/NAME/VERSION")
    promote.add_argument("alias")
    promote.add_argument("--workdir", type=Path, help="in this work directory's own registry")
    promote.set_defaults(run=promote_model)


def pull_model(options: argparse.Namespace) -> int:
    from minilm.orchestrator.tracking.pull import pull

    model = pull(store(options), options.uri, options.out)
    print(f"{model.name} version {model.version} is in {options.out}")
    return 0


def promote_model(options: argparse.Namespace) -> int:
    from minilm.orchestrator.tracking import registry

    found = registry.resolve(store(options), options.uri)
    registry.promote(store(options), found.name, found.version, options.alias)
    print(f"models:/{found.name}@{options.alias} is version {found.version} now")
    return 0


def store(options: argparse.Namespace) -> str:
    """The MLflow that holds the registry: the server that the environment names, or a work directory's own."""
    if options.workdir is not None:
        return f"sqlite:///{options.workdir.resolve() / 'mlflow.db'}"
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    raise UserError(
        "set MLFLOW_TRACKING_URI to the registry, or give --workdir DIR of the run that registered it"
    )
