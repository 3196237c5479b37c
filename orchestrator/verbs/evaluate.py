"""`minilm evaluate`: what models are worth on tasks with labels, beside their teacher and without distillation."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import check_place
from minilm.orchestrator.verbs.arguments import add_json, add_verb, positive_whole

if TYPE_CHECKING:
    from minilm.orchestrator.evaluation.comparison import Comparison
    from minilm.orchestrator.evaluation.sources import Source
    from minilm.orchestrator.recipe.references import RegistryRef
    from minilm.orchestrator.stage.folder import RunFolder

DEFAULT_OUT = Path("runs/evaluation")
PROTOCOL_NAMES = (
    "glue-minilm",
    "glue-fixed",
    "embed-fast",
    "squad2",
    "xnli",
)  # those of PROTOCOLS: a test says


def add_evaluate(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        "score models on tasks with labels, side by side",
        "minilm evaluate STUDENT random:STUDENT --teacher TEACHER --tasks stsb-embed --data DIR",
        "minilm evaluate STUDENT --tasks cola,sst2 --protocol glue-fixed --data DIR --json",
    )
    verb.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder, hub id, models:/NAME@ALIAS, package:NAME/PATH; controls: random:FOLDER, layers:FOLDER:3x192",
    )
    verb.add_argument(
        "--teacher", metavar="MODEL", help="score this one too, and say what part of it is kept"
    )
    verb.add_argument("--tasks", metavar="NAME,…", help="default: those of the protocol that --data holds")
    add_trial_options(verb)
    verb.add_argument("--workdir", type=Path, help="of the run that registered a models:/… here")
    verb.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"results, reused (default: {DEFAULT_OUT})",
    )
    add_json(verb, "print a JSON object a line, for programs")
    verb.set_defaults(run=evaluate)


TRIAL_OPTIONS = ("--protocol", "--data", "--seeds", "--train-rows", "--parallel")


def add_trial_options(verb: argparse.ArgumentParser) -> None:
    """`TRIAL_OPTIONS`: how models are scored, and on what."""
    verb.add_argument(
        "--protocol", choices=PROTOCOL_NAMES, help="default: glue-fixed, embed-fast without --tasks"
    )
    verb.add_argument("--data", type=Path, metavar="DIR", help="holds a folder for each task")
    verb.add_argument("--seeds", type=positive_whole, metavar="N", help="default: the protocol's")
    verb.add_argument(
        "--train-rows",
        type=positive_whole,
        metavar="N",
        help="learn from so many rows at most, the same for all",
    )
    verb.add_argument(
        "--parallel",
        type=positive_whole,
        metavar="N",
        help="trials at once, each with one thread (default: as many as cores and memory allow; on a GPU 1)",
    )


def evaluate(options: argparse.Namespace) -> int:
    from minilm.orchestrator.evaluation.comparison import Comparison, score_all

    if options.data is None:
        raise UserError(
            "give --data DIR, which holds a folder with the published files of each task (DIR/STS-B/, DIR/CoLA/, …); "
            "the hub's data sets are not read"
        )
    check_place(options.out)
    given = list(dict.fromkeys([*([options.teacher] if options.teacher else []), *options.models]))
    sources = [open_source(text, options) for text in given]
    comparison = Comparison(score_all(run_trials(options, sources)), sources, options.teacher)
    if options.json:
        for score in comparison.scores:
            print(json.dumps(score.as_dict()))
        return 0
    print(comparison.text())
    write_report(comparison, options.out)
    return 0


def run_trials(options: argparse.Namespace, sources: list[Source]) -> list[dict[str, Any]]:
    """The results of every trial of these models, from their files in --out where they are there."""
    from minilm.orchestrator.evaluation.protocols import protocol_of
    from minilm.orchestrator.evaluation.speed import this_device
    from minilm.orchestrator.evaluation.tasks import find_tasks
    from minilm.orchestrator.evaluation.trials import plan_trials, processes_for, side_by_side

    names = options.tasks.split(",") if options.tasks else tasks_there(options)
    tasks = [(task, protocol_of(task, options.protocol)) for task in find_tasks(names)]
    device = this_device()
    trials = plan_trials(
        sources,
        tasks,
        options.data,
        seeds=options.seeds,
        train_rows=options.train_rows,
        device=device,
        results=options.out,
    )
    processes = options.parallel or processes_for(trials, options.out)
    results = []
    with closing(side_by_side(trials, options.out, processes)) as running:
        for number, trial in enumerate(trials, start=1):
            if not options.quiet and not trial.file(options.out).exists():
                print(
                    f"[{number}/{len(trials)}] {trial.source.name}  {trial.task}  {trial.setting}  seed {trial.seed}",
                    file=sys.stderr,
                )
            results.append(next(running))
    return results


def write_report(comparison: Comparison, out: Path) -> None:
    """Measure the models' size and speed, print them, and write page and Markdown into `out`."""
    from minilm.orchestrator.evaluation.report.page import size_table, write_reports
    from minilm.orchestrator.evaluation.speed import machine
    from minilm.orchestrator.system.text import text_table

    sizes = write_reports(out, "Encoders side by side", comparison)
    print(f"\n{text_table(size_table(sizes))}\nmeasured on {machine()}")
    print(f"\nthe page: {out / 'report.html'}; as Markdown: {out / 'report.md'}")


def tasks_there(options: argparse.Namespace) -> list[str]:
    """The protocol's tasks that have a folder in --data."""
    from minilm.orchestrator.evaluation.protocols import PROTOCOLS
    from minilm.orchestrator.evaluation.read_tables import task_folder
    from minilm.orchestrator.evaluation.tasks import TASKS

    names = PROTOCOLS[options.protocol or "embed-fast"].tasks
    found = []
    for name in names:
        with suppress(UserError):
            task_folder(TASKS[name], options.data)
            found.append(name)
    return found or list(names[:1])  # the first one's error says what is there and what is expected


def open_source(text: str, options: argparse.Namespace) -> Source:
    """The model that `text` names, brought here and looked at. Raises `UserError` where it can't be used."""
    from minilm.orchestrator.evaluation.sources import Source, check_source, split_control
    from minilm.orchestrator.recipe.references import FolderRef, RegistryRef, expanded, parse_reference
    from minilm.orchestrator.resolve.folders import model_folder
    from minilm.orchestrator.stage.folder import RunFolder

    kind, reference, shape = split_control(text)
    local = expanded(reference)
    ref = FolderRef(local) if local.is_dir() else parse_reference(reference)
    folder = RunFolder(options.workdir or options.out)
    if isinstance(ref, RegistryRef):
        ref = at_its_version(ref, folder)
    source = Source(text, kind, str(model_folder(ref, folder)), shape)
    check_source(source)
    return source


def at_its_version(ref: RegistryRef, folder: RunFolder) -> RegistryRef:
    """An alias as the version that it names now; `model_folder` would keep what it meant the first time."""
    from minilm.orchestrator.recipe.references import RegistryRef
    from minilm.orchestrator.tracking.client import is_missing, tracking_uri
    from minilm.orchestrator.tracking.registry import resolve

    store = tracking_uri(folder.root)
    return ref if is_missing(store) else RegistryRef(resolve(store, ref.uri).uri)
