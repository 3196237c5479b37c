"""`minilm check`: everything that is wrong with recipes, and what this machine lacks for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import RecipeErrors
from minilm.orchestrator.verbs.arguments import add_overrides


def add_check(verbs: Any) -> None:
    check = verbs.add_parser("check", help="say everything that is wrong with recipes")
    check.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE.yaml")
    add_overrides(check)
    check.set_defaults(run=check_recipes)


def check_recipes(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.load import load_recipe
    from minilm.orchestrator.recipe.missing import missing_inputs

    problems: list[str] = []
    for path in options.recipes:
        try:
            recipe = load_recipe(path, options.set)
        except RecipeErrors as error:
            problems += error.problems
            continue
        if any(Path(stage.teacher).is_dir() for stage in recipe.stages):
            from minilm.orchestrator.resolve.compatibility import config_problems

            if wrong := config_problems(recipe):
                problems += [f"{path}: {problem}" for problem in wrong]
                continue
        stages = ", ".join(f"{stage.name} ({stage.steps:,} steps)" for stage in recipe.stages)
        print(f"{path}: sound; stages: {stages}")
        for note in missing_inputs(recipe):
            print(f"{path}: not here: {note}")
    if problems:
        raise RecipeErrors(problems)
    return 0
