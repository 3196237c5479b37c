"""`minilm status`: where a run is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minilm.orchestrator.verbs.arguments import add_json, add_verb, print_report


def add_status(verbs: Any) -> None:
    status = add_verb(
        verbs,
        "status",
        "say where a run is, from the files of its work directory",
        "minilm status runs/quickstart",
        "minilm status runs/quickstart --json",
    )
    status.add_argument("workdir", type=Path, metavar="WORKDIR")
    add_json(status)
    status.set_defaults(run=show_status)


def show_status(options: argparse.Namespace) -> int:
    from minilm.orchestrator.driver.run_status import run_status

    print_report(run_status(options.workdir), options)
    return 0
