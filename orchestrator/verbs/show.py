"""`minilm show` and `minilm diff`: what a recipe is, with all that it leaves unsaid, and what differs between two."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_json, add_overrides, add_recipe, add_verb, print_report


def add_show(verbs: Any) -> None:
    show = add_verb(
        verbs,
        "show",
        "print a recipe with every default, and where each value comes from",
        "minilm show recipes/quickstart.yaml",
        "minilm show mine.yaml --set stages.student.steps=1000 > whole.yaml",
        "minilm show mine.yaml --json",
    )
    add_recipe(show)
    add_overrides(show)
    add_json(show, "print a JSON object: recipe, files, digest, values (path, value, origin)")
    show.set_defaults(run=show_recipe)


def show_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.load import read_recipe
    from minilm.orchestrator.recipe.show import values, whole_text
    from minilm.orchestrator.system.files import sha256_json

    recipe, source = read_recipe(options.recipe, options.set)
    digest = sha256_json(recipe.result_fields())
    if options.json:
        shown = [
            {"path": ".".join(map(str, one.path)), "value": one.value, "origin": one.origin}
            for one in values(recipe, source)
        ]
        whole = {"recipe": recipe.name, "files": source.files, "digest": digest, "values": shown}
        print(json.dumps(whole, ensure_ascii=False))
    else:
        print(whole_text(recipe, source, digest), end="")
    return 0


def add_diff(verbs: Any) -> None:
    diff = add_verb(
        verbs,
        "diff",
        "say what differs between two recipes, and which stages it makes useless",
        "minilm diff old.yaml new.yaml",
        "minilm diff runs/mine mine.yaml --set stages.student.steps=200000",
    )
    diff.add_argument("old", type=Path, metavar="A", help="a recipe, or the work directory of a run")
    diff.add_argument("new", type=Path, metavar="B", help="a recipe")
    diff.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a key of B")
    add_json(diff, "print a JSON object: same, keys, useless, kept, new, left_out, other_name")
    diff.set_defaults(run=diff_recipes)


def diff_recipes(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.difference import by_name, differences, flatten
    from minilm.orchestrator.recipe.load import read_recipe
    from minilm.orchestrator.recipe.show import values
    from minilm.orchestrator.stage.folder import RunFolder
    from minilm.orchestrator.system.files import read_json

    new, new_source = read_recipe(options.new, options.set)
    now = new.result_fields()
    if options.old.is_dir():
        record = read_json(RunFolder(options.old).run)
        if record is None:
            raise UserError(
                f"{options.old}: given a folder without run.json; allowed: a recipe, or the work directory of a run"
            )
        found = differences(flatten(record["recipe"]), flatten(now), record["recipe"], now)
    else:
        old, old_source = read_recipe(options.old)
        shown = by_name(values(old, old_source)), by_name(values(new, new_source))
        found = differences(*shown, old.result_fields(), now)
    print_report(found, options)
    return 0
