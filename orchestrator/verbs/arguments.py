"""How a verb is added, options that several verbs share, and the types that argparse lacks."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, which also guesses what a mistyped verb, choice or option was meant to be."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            text = f"given {str(value)!r}{did_you_mean(str(value), allowed)}; allowed: {', '.join(allowed)}"
            raise argparse.ArgumentError(action, text)

    def refuse_unknown(self, unknown: list[str]) -> NoReturn:
        """End the process, as argparse does for arguments that nobody has asked for."""
        own = [name for action in self._actions for name in action.option_strings]
        names = [text.partition("=")[0] for text in unknown]
        if early := [text for text, name in zip(unknown, names, strict=True) if name in own]:
            self.error(
                f"given {' '.join(early)} before the verb; write it behind: {self.prog} {' '.join(early)}"
            )
        guess = next(filter(None, (did_you_mean(name, own) for name in names)), "")
        self.error(
            f"given {' '.join(unknown)}, which {self.prog} does not take{guess}; see {self.prog} --help"
        )


def did_you_mean(text: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, list(allowed), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def add_group(verbs: Any, name: str, help: str, *examples: str) -> Parser:
    """Add a verb that has verbs of its own (`add_verbs`)."""
    return _add(verbs, name, help, examples)


def add_verbs(parser: argparse.ArgumentParser) -> Any:
    """What a parser's verbs are added to."""
    return parser.add_subparsers(title="verbs", required=True, metavar="VERB")


def add_verb(verbs: Any, name: str, help: str, *examples: str) -> Parser:
    """Add a verb, whose caller sets `run`, a function of the parsed options. `examples`: commands, for its help."""
    verb = _add(verbs, name, help, examples)
    loudness = verb.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="show results, warnings and errors only")
    loudness.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="show the log too; twice: all of it, and tracebacks",
    )
    return verb


def _add(verbs: Any, name: str, help: str, examples: Iterable[str]) -> Parser:
    parser: Parser = verbs.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="\n  ".join(("examples:", *examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


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


def add_json(verb: argparse.ArgumentParser, help: str = "print JSON, for programs") -> None:
    verb.add_argument("--json", action="store_true", help=help)


def add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a recipe key"
    )


def add_recipe(verb: argparse.ArgumentParser, help: str | None = None) -> None:
    verb.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help=help)


def print_report(report: Any, options: argparse.Namespace) -> None:
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text())
