"""`minilm pull`, `minilm promote` and `minilm register`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_verb
from minilm.orchestrator.verbs.gate import add_gate_options, is_gated, promote_gated


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
        "point an alias to a version of a registered model (champion: when its scores hold)",
        "minilm promote models:/quickstart-student/1 good --workdir runs/quickstart",
        "minilm promote models:/quickstart-student/1 champion --tasks cola,sst2 --workdir runs/quickstart",
        "minilm promote models:/quickstart-student/2 champion --evaluate --data DIR --tasks cola --against stable",
    )
    promote.add_argument("uri", metavar="models:/NAME/VERSION")
    promote.add_argument("alias")
    promote.add_argument("--workdir", type=Path, help="in this work directory's own registry")
    add_gate_options(promote)
    promote.set_defaults(run=promote_model)


def add_register(verbs: Any) -> None:
    register = add_verb(
        verbs,
        "register",
        "put an encoder's folder into the model registry",
        "minilm register ./bert-base bert --workdir runs/mine",
        "MLFLOW_TRACKING_URI=http://mlflow:5000 minilm register ./bert-base bert --alias good",
    )
    register.add_argument(
        "folder", type=Path, metavar="FOLDER", help="as save_pretrained of transformers writes it"
    )
    register.add_argument("name", metavar="NAME", help="of the registered model")
    register.add_argument("--alias", type=new_alias, default="newest", help="that it gets (default: newest)")
    register.add_argument("--experiment", help="of MLflow, for its files (default: NAME)")
    register.add_argument("--workdir", type=Path, help="into this work directory's own registry")
    register.set_defaults(run=register_model)


def new_alias(text: str) -> str:
    """An alias that MLflow takes: it is told of it last, when the files are there."""
    if not re.fullmatch(r"[\w-]+", text) or re.fullmatch(r"latest|v\d+", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"given {text!r}; allowed: letters, digits, - and _, but none that MLflow keeps for itself (latest, v1, …)"
        )
    return text


def pull_model(options: argparse.Namespace) -> int:
    from minilm.orchestrator.tracking.pull import pull

    model = pull(store(options), options.uri, options.out)
    print(f"{model.name} version {model.version} is in {options.out}")
    return 0


def promote_model(options: argparse.Namespace) -> int:
    from minilm.orchestrator.tracking import registry

    found = registry.resolve(store(options), options.uri)
    if is_gated(options):
        promote_gated(options, store(options), found)
    else:
        registry.promote(store(options), found.name, found.version, options.alias)
    print(f"models:/{found.name}@{options.alias} is version {found.version} now")
    return 0


def register_model(options: argparse.Namespace) -> int:
    registry_store = store(options)  # before the seconds that it takes to import torch
    from minilm.orchestrator.system.files import check_place

    if options.workdir is not None:
        check_place(options.workdir)
    from minilm.model.encoder.build import count_parameters, load_encoder
    from minilm.model.encoder.shape import shape_of
    from minilm.orchestrator.tracking import registry
    from minilm.orchestrator.tracking.model_files import model_files

    model_files(options.folder)
    model = load_encoder(options.folder.resolve()).model  # what can't be loaded is no use to anybody
    if options.workdir is not None:
        options.workdir.mkdir(parents=True, exist_ok=True)
    registry.check_rights(registry_store, [options.name])
    run_id = registry.make_run(
        registry_store, options.name, options.folder, experiment=options.experiment or options.name
    )
    found = registry.register(
        registry_store,
        options.name,
        options.folder,
        run_id=run_id,
        alias=options.alias,
        tags=registry.shape_tags(shape_of(model.config), count_parameters(model)),
    )
    print(f"{options.folder} is {found.uri} now, and models:/{found.name}@{options.alias}")
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
