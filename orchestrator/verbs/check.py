"""`minilm check`: everything that is wrong with recipes, and what this machine lacks for them."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.data.errors import DataError
from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.verbs.arguments import add_json, add_overrides, add_verb

if TYPE_CHECKING:
    from minilm.orchestrator.recipe.schema import Recipe


def add_check(verbs: Any) -> None:
    check = add_verb(
        verbs,
        "check",
        "say everything that is wrong with recipes",
        "minilm check recipes/*.yaml",
        "minilm check mine.yaml --set data.text=/corpora/wiki",
        "minilm check --json mine.yaml",
    )
    check.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE.yaml")
    add_overrides(check)
    check.add_argument(
        "--strict",
        action="store_true",
        help="fail on what can't be looked at here: teachers, data, devices, buckets",
    )
    add_json(check, "print a JSON object a recipe: recipe, sound, problems, warnings, not_here, stages")
    check.set_defaults(run=check_recipes)


def check_recipes(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.load import read_recipe
    from minilm.orchestrator.resolve.workers import workers_of

    problems: list[str] = []
    for path in options.recipes:
        recipe, source, wrong, notes = None, None, [], []
        warnings: list[str] = []
        try:
            recipe, source = read_recipe(path, options.set)
            problems_here, warnings = findings_here(recipe)
            wrong = [f"{path}: {problem}" for problem in problems_here]
        except RecipeErrors as error:
            wrong = list(error.problems)
        if recipe and not wrong:
            notes = lacking(recipe)
            wrong = [f"{path}: not here: {note}" for note in notes] if options.strict else []
        problems += wrong
        if options.json:
            print(as_json(path, recipe, wrong, warnings, notes))
        elif recipe and source and not wrong:
            stages = ", ".join(
                f"{stage.name} ({'at most ' if stage.until else ''}{stage.steps:,} steps)"
                for stage in recipe.stages
            )
            print(f"{path}: sound; stages: {stages}")
            for number, note in source.notes.items():
                print(f"{path}: stage {recipe.stages[number].name}: {note}")
            if reason := workers_of(recipe).reason:
                print(f"{path}: {reason}")
            for warning in warnings:
                print(f"{path}: warning: {warning}")
            for note in notes:
                print(f"{path}: not here: {note}")
    if problems:
        raise RecipeErrors(problems)
    return 0


def as_json(
    path: Path, recipe: Recipe | None, problems: list[str], warnings: list[str], not_here: list[str]
) -> str:
    stages = [{"name": stage.name, "steps": stage.steps} for stage in recipe.stages] if recipe else []
    values = {"recipe": str(path), "sound": not problems, "problems": problems, "not_here": not_here}
    return json.dumps(values | {"warnings": warnings, "stages": stages}, ensure_ascii=False)


def findings_here(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Whatever a run would refuse, and warn of, that can be told from what is on this machine."""
    from minilm.orchestrator.plan.advice import advice
    from minilm.orchestrator.resolve.evaluation import evaluation_problems, probe_problems
    from minilm.orchestrator.resolve.folders import folder_here

    references = {stage.teacher for stage in recipe.stages}
    references |= {s.starts_from for stage in recipe.stages for s in stage.students if s.starts_from}
    references -= set(recipe.student_names)
    references |= {recipe.data.tokenizer} if recipe.data.tokenizer else set()
    data_sets = [corpus.shards or f"{corpus.tokens}.bin" for corpus in recipe.data.corpora or ()]
    with suppress(UserError):  # a folder without a model: `resolve` says so
        here = any(Path(path).exists() for path in data_sets) or any(map(folder_here, references))
        if not here and recipe.data.source == "text":
            length = recipe.data.seq_len if recipe.data.text else None
            # nothing else to look at, and torch takes seconds to import
            problems = evaluation_problems(recipe) + probe_problems(recipe)
            return problems, advice(recipe, seq_len=length)
    from minilm.orchestrator.plan.reading import reading
    from minilm.orchestrator.resolve.licences import licence_notes
    from minilm.orchestrator.resolve.stages import known_data, position_notes, resolve, start_notes

    stages, problems = resolve(recipe, folder_here)
    if problems:
        return problems, []
    known, data = known_data(recipe, folder_here), None
    with suppress(DataError):  # of a text that only a run looks at
        data = reading(recipe)
    length = known[0] if known else recipe.data.seq_len if recipe.data.text else None
    notes = [*position_notes(stages, known[0]), *start_notes(stages, known[2])] if known else []
    notes += licence_notes(recipe, stages)
    return [], notes + advice(recipe, stages, data, length)


def lacking(recipe: Recipe) -> list[str]:
    """What a run needs and this machine lacks, or can't look at."""
    from minilm.orchestrator.recipe.missing import missing_inputs, unseen_inputs

    notes = missing_inputs(recipe) + unseen_inputs(recipe)
    compute, corpora = recipe.compute, recipe.data.corpora or ()
    remote = any("://" in corpus.shards for corpus in corpora if corpus.shards)
    if compute.device == "cuda" or compute.checkpoints or remote:
        from minilm.orchestrator.driver.preflight import check_checkpoints, check_device, check_shards

        looks = [partial(check_device, compute), partial(check_checkpoints, compute, Path())]
        for look in [*looks, *(partial(check_shards, corpus) for corpus in corpora)]:
            try:
                look()
            except UserError as error:
                notes.append(str(error))
    return notes
