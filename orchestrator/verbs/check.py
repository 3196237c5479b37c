"""`minilm check`: everything that is wrong with recipes, and what this machine lacks for them."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.verbs.arguments import add_overrides

if TYPE_CHECKING:
    from minilm.orchestrator.recipe.schema import Recipe


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
        if wrong := problems_here(recipe):
            problems += [f"{path}: {problem}" for problem in wrong]
            continue
        stages = ", ".join(f"{stage.name} ({stage.steps:,} steps)" for stage in recipe.stages)
        print(f"{path}: sound; stages: {stages}")
        for note in missing_inputs(recipe):
            print(f"{path}: not here: {note}")
    if problems:
        raise RecipeErrors(problems)
    return 0


def problems_here(recipe: Recipe) -> list[str]:
    """Whatever a run would refuse that can be told from what is on this machine: configs, tokenizers, manifests."""
    from minilm.orchestrator.resolve.folders import folder_here

    references = {stage.teacher for stage in recipe.stages} - set(recipe.student_names)
    references |= {s.starts_from for stage in recipe.stages for s in stage.students if s.starts_from}
    references |= {recipe.data.tokenizer} if recipe.data.tokenizer else set()
    data_sets = [corpus.shards or f"{corpus.tokens}.bin" for corpus in recipe.data.corpora or ()]
    with suppress(UserError):  # a folder without a model: `resolve` says so
        here = any(Path(path).exists() for path in data_sets) or any(map(folder_here, references))
        if not here and recipe.data.source == "text":
            return []  # nothing to look at, and torch takes seconds to import
    from minilm.orchestrator.resolve.stages import resolve

    return resolve(recipe, folder_here)[1]
