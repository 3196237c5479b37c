"""`minilm status` and `minilm watch`: where a run is, once or as a page that is kept up to date."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_json, add_verb, print_report


def add_status(verbs: Any) -> None:
    status = add_verb(
        verbs,
        "status",
        "say where a run is, from the files of its work directory",
        "minilm status runs/quickstart",
        "minilm status runs/quickstart --json",
    )
    add_run_folder(status)
    add_json(status)
    status.set_defaults(run=show_status)


def add_watch(verbs: Any) -> None:
    watch = add_verb(
        verbs,
        "watch",
        "show a run while it works: stages, curves, workers, time left",
        "minilm watch runs/quickstart",
        "minilm watch quickstart --once",
    )
    add_run_folder(watch)
    watch.add_argument("--once", action="store_true", help="print the page and end")
    watch.set_defaults(run=watch_run)


def add_run_folder(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "workdir", type=Path, metavar="WORKDIR", help="a run's work directory, or NAME for runs/NAME"
    )


def show_status(options: argparse.Namespace) -> int:
    from minilm.orchestrator.driver.run_status import run_status

    with readable(options.workdir) as folder:
        print_report(run_status(folder), options)
    return 0


def watch_run(options: argparse.Namespace) -> int:
    from minilm.orchestrator.driver.watch.live import watch

    with readable(options.workdir) as folder:
        watch(folder, once=options.once)
    return 0


@contextmanager
def readable(given: Path) -> Iterator[Path]:
    """The work directory that was meant. A folder that may not be read is a `UserError`."""
    from minilm.orchestrator.driver.workdir import default_workdir

    try:
        named = default_workdir(str(given))
        yield named if not given.exists() and named.exists() else given
    except PermissionError as error:
        raise UserError(
            f"{error.filename} can't be read ({error.strerror}); ask its owner, or give another"
        ) from error
