"""What comes with the command: `minilm --version`, `minilm list`, `minilm copy` and `minilm completion`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilm.orchestrator.verbs.arguments import Parser, add_json, add_verb

SHELLS = ("bash", "zsh", "fish")


class Version(argparse.Action):
    """Prints version and commit, which are looked up only then."""

    def __init__(self, option_strings: list[str], dest: str):
        what = "print the version and, in a checkout, the commit"
        super().__init__(option_strings, argparse.SUPPRESS, argparse.SUPPRESS, help=what)
        self.nargs = 0

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from minilm.orchestrator.system.versions import OURS, git_commit, versions

        commit = git_commit()
        version = versions([OURS]).get(OURS, "(not installed)")
        print(f"minilm {version}" + (f" (commit {commit})" if commit else ""))
        parser.exit()


def add_list(verbs: Any) -> None:
    listed = add_verb(
        verbs,
        "list",
        "list the recipes that come with this package",
        "minilm list",
        "minilm list --json",
    )
    add_json(listed, "print a JSON object a recipe")
    listed.set_defaults(run=list_recipes)


def list_recipes(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.library import LIBRARY, packaged_recipes
    from minilm.orchestrator.system.text import text_table

    recipes = packaged_recipes()
    if options.json:
        for recipe in recipes:
            print(json.dumps(asdict(recipe), ensure_ascii=False))
        return 0
    rows = [("recipe", "students, layers x hidden", "teacher", "steps", "what it is for")]
    for one in recipes:
        sizes = ", then ".join(f"{s.layers} x {s.hidden}" for s in one.students)
        steps = f"{sum({s.stage: s.steps for s in one.students}.values()):,}"
        rows.append((one.name, sizes, one.teacher, steps, one.purpose))
    print(f"{text_table(rows)}\n\nThey lie in {LIBRARY}; one is brought here by: minilm copy NAME")
    return 0


def add_copy(verbs: Any) -> None:
    copy = add_verb(
        verbs,
        "copy",
        "bring a recipe that comes with this package here, to change it",
        "minilm copy quickstart",
        "minilm copy bert-l6-h384-ta --to recipes-of-mine",
    )
    copy.add_argument("name", metavar="NAME", help="as `minilm list` has it")
    copy.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="(default: the current one)")
    copy.set_defaults(run=copy_recipe)


def copy_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.library import copy_recipe

    first, *others = copy_recipe(options.name, options.to)
    beside = f", and what it extends beside it: {', '.join(map(str, others))}" if others else ""
    print(f"{first} is yours{beside}; look at it with: minilm check {first}")
    return 0


def add_completion(verbs: Any, top: Parser) -> None:
    completion = add_verb(
        verbs,
        "completion",
        "print the script that lets a shell complete this command",
        'eval "$(minilm completion bash)"                                   # in ~/.bashrc',
        "minilm completion zsh > ~/.zfunc/_minilm                           # ~/.zfunc: a folder of your fpath",
        "minilm completion fish > ~/.config/fish/completions/minilm.fish",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=lambda options: print_completion(top, options.shell))


def print_completion(top: Parser, shell: str) -> int:
    import shtab

    for action in actions(top):
        if action.type in (None, Path) and action.nargs != 0 and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, shell))
    return 0


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from actions(verb)
