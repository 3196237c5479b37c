"""Options that several verbs share, and the types that argparse lacks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any


def positive_whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a whole number above 0")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a number above 0")
    return value


def add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="for programs")


def add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a recipe key"
    )


def add_recipe(verb: argparse.ArgumentParser, help: str | None = None) -> None:
    verb.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help=help)


def print_report(report: Any, options: argparse.Namespace) -> None:
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text())
