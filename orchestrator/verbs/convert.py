"""`minilm export` and `minilm shrink`: a model's folder made into another, for whoever loads it next."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_json, add_verb, positive_whole
from minilm.orchestrator.verbs.data_build import add_allow_skipped, add_text_options
from minilm.orchestrator.verbs.evaluate import DEFAULT_OUT
from minilm.orchestrator.verbs.gate import not_negative

if TYPE_CHECKING:
    from minilm.orchestrator.deploy.export import Report
    from minilm.orchestrator.evaluation.sources import Source
    from minilm.orchestrator.tracking.registry import RegisteredModel

FORMATS = ("onnx", "openvino", "sentence-transformers")  # those of PACKAGES: a test says


def add_model_and_out(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", metavar="MODEL", help="a folder, hub id, models:/NAME@ALIAS or package:NAME/PATH"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    verb.add_argument("--workdir", type=Path, help="of the run that registered a models:/… here")
    add_json(verb, "print a JSON object, for programs")


def add_export(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export",
        "write a model in the format that a service loads, checked against PyTorch and measured",
        "minilm export STUDENT student-onnx --format onnx",
        "minilm export STUDENT student-onnx --format onnx --int8 --task stsb-embed --data DIR",
        "minilm export STUDENT embedder --format sentence-transformers",
    )
    add_model_and_out(verb)
    verb.add_argument("--format", choices=FORMATS, required=True)
    verb.add_argument("--int8", action="store_true", help="write it in 8 bits too, if its score holds (onnx)")
    verb.add_argument(
        "--max-drop",
        type=not_negative,
        metavar="DROP",
        help="of the score in 8 bits (default: 0.005)",
    )
    verb.add_argument("--task", metavar="NAME", help="that says so (default: stsb-embed)")
    verb.add_argument("--data", type=Path, metavar="DIR", help="holds the task's folder")
    verb.set_defaults(run=export_model)


def export_model(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from minilm.orchestrator.deploy.packages import require_packages
    from minilm.orchestrator.evaluation.tasks import find_tasks

    require_packages(options.format)  # before the seconds that it takes to import torch
    if options.int8 and options.data is None:
        raise UserError(
            "--int8 needs --data DIR, which holds the published files of --task (DIR/STS-B/ for stsb-embed): what 8 "
            "bits cost is measured there"
        )
    if not options.int8:
        for name in ("data", "task", "max_drop"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} is of 8 bits and what they cost; give --int8 too, or leave {option} out"
                )
    (task,) = find_tasks([options.task or "stsb-embed"])

    from minilm.orchestrator.deploy.export import Gate, export

    max_drop = 0.005 if options.max_drop is None else options.max_drop
    gate = Gate(task, options.data, max_drop) if options.int8 else None
    quiet = options.quiet or options.json
    registered = find_registered(options)
    source = find_model(options)
    report = export(
        source,
        options.out,
        options.format,
        gate,
        lambda text: None if quiet else print(text, file=sys.stderr),
    )
    if registered:
        record(report, *registered, options.out)
    print(json.dumps(asdict(report)) if options.json else f"{report.text()}\n\n{options.out} is written")
    return 0


def find_registered(options: argparse.Namespace) -> tuple[str, RegisteredModel] | None:
    """The store and the version of a registered MODEL, which the options name by its number from here on."""
    from minilm.orchestrator.tracking.client import tracking_uri
    from minilm.orchestrator.tracking.registry import resolve

    if not options.model.startswith("models:"):
        return None
    store = tracking_uri(options.workdir or DEFAULT_OUT)
    found = resolve(store, options.model)
    options.model = found.uri
    return store, found


def record(report: Report, store: str, model: RegisteredModel, out: Path) -> None:
    """Note the results on the registered version; where that can't be, a warning: `out` is there, and says them too."""
    from dataclasses import asdict

    from minilm.orchestrator.errors import InfrastructureError
    from minilm.orchestrator.tracking.exports import record_export
    from minilm.orchestrator.tracking.promotion import Metric

    metrics, drop = [], report.int8
    if drop:
        name = f"{drop.task}/{drop.metric}/{report.format}-int8"
        metrics = [
            Metric(name, drop.int8, drop.task, drop.data),
            Metric(f"{name}-drop", drop.drop, drop.task, drop.data),
        ]
    try:
        record_export(store, model, report.format, asdict(report), metrics)
    except (UserError, InfrastructureError) as error:
        print(f"minilm: warning: {out} is whole, but {model.uri} does not say so: {error}", file=sys.stderr)


def find_model(options: argparse.Namespace) -> Source:
    """The MODEL, brought here (never into OUT, which has to be new). UserError for a control of an evaluation."""
    from minilm.orchestrator.verbs.evaluate import open_source

    source = open_source(options.model, argparse.Namespace(workdir=options.workdir, out=DEFAULT_OUT))
    if source.is_control:
        raise UserError(f"{source.name} is a control of an evaluation; give the folder of a model")
    return source


def add_shrink(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "shrink",
        "write a model with a smaller vocabulary, chosen from a text; distil from it as from any teacher",
        "minilm shrink intfloat/multilingual-e5-small e5-de --text corpus/*.txt --keep 30000",
        "minilm shrink TEACHER smaller --text package:NAME/texts.json --min-count 5",
    )
    add_model_and_out(verb)
    verb.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="of the kind it is for; as `data build` takes it",
    )
    add_text_options(verb)
    add_allow_skipped(verb)
    how = verb.add_mutually_exclusive_group(required=True)
    how.add_argument("--keep", type=positive_whole, metavar="N", help="at most so many tokens")
    how.add_argument(
        "--min-count", type=positive_whole, metavar="N", help="the tokens that the text has so many times"
    )
    verb.set_defaults(run=shrink_model)


def shrink_model(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from minilm.orchestrator.deploy.shrink import shrink
    from minilm.orchestrator.recipe.schema import TEXT_OPTIONS
    from minilm.orchestrator.resolve.folders import text_inputs

    source = find_model(options)
    report = shrink(
        source.name,
        Path(source.folder),
        options.out,
        text_inputs(options.text),
        {name: getattr(options, name) for name in TEXT_OPTIONS},
        keep=options.keep,
        min_count=options.min_count,
        allow_skipped=options.allow_skipped,
        warn=lambda line: print(f"minilm: warning: {line}", file=sys.stderr),
    )
    print(json.dumps(asdict(report)) if options.json else f"{report.text()}\n\n{options.out} is written")
    return 0
