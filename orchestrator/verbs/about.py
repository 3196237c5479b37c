"""What comes with the command: `minilm --version` and `minilm completion`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilm.orchestrator.verbs.arguments import Parser, add_verb

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
