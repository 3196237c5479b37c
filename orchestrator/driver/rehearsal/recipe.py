"""A recipe for a few steps a stage, made of the true one: what is changed for a rehearsal, and nothing else.

Kept are teachers, students, objectives, batches, sizes, workers, launcher and device. The learning rate rises as in the
true first steps. `until` goes, so that each stage makes its steps. Nothing is left that writes outside the work
directory: checkpoints elsewhere, the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minilm.orchestrator.recipe.fields import INITIALIZATIONS
from minilm.orchestrator.recipe.schema import OPEN_SCHEDULES, Recipe, Stage

STEPS, CHECKPOINT_EVERY = 8, 2
EVALUATION = {"seeds": 1, "train_rows": 16, "controls": False, "protocol": "glue-fixed"}
HELD_OUT = 0.1  # of a small part of the text, or it might hold no row


def few_steps(
    recipe: Recipe,
    place: Callable[[str], str],
    *,
    shards: Path | None = None,
    sample: Path | None = None,
    tasks: Path | None = None,
) -> dict[str, Any]:
    """The values of the rehearsal's recipe, which `yaml` can write.

    place(reference): where a model that is no student is read from. In place of the recipe's text: the data set
    `shards` that was built from it, or `sample`, a jsonl file. tasks: in place of the evaluation's data.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True)
    stages = [
        few_steps_of(stage, given, place, recipe.student_names)
        for stage, given in zip(recipe.stages, values["stages"], strict=True)
    ]
    compute = values.get("compute", {}) | {
        "checkpoint_every_steps": CHECKPOINT_EVERY,
        "checkpoint_every_seconds": 3600.0,
        "checkpoints": None,
        "keep_every_steps": None,
    }
    tracking = values["tracking"] | {"log_every": 1, "per_head": False}
    changes: dict[str, Any] = {"stages": stages, "compute": compute, "tracking": tracking, "promote": None}
    changes["data"] = data_values(values["data"], shards, sample, recipe.data.held_out)
    if changes["data"].get("tokenizer"):
        changes["data"]["tokenizer"] = place(changes["data"]["tokenizer"])
    if recipe.evaluation:
        changes["evaluation"] = values["evaluation"] | EVALUATION | ({"data": str(tasks)} if tasks else {})
    return values | changes


def few_steps_of(
    stage: Stage, values: Mapping[str, Any], place: Callable[[str], str], names: tuple[str, ...]
) -> dict[str, Any]:
    """`values`: of `stage` as it was given. names: of all students."""
    steps = min(stage.steps, STEPS)
    decay = 1 if stage.schedule == "wsd" and steps > 1 else None
    warmup = min(stage.warmup_steps, steps - 1 - (decay or 0))
    changes: dict[str, Any] = {
        "steps": steps,
        "warmup_steps": max(warmup, 0),
        "eval_every": None,
        "held_out_rows": min(stage.held_out_rows, stage.batch),
        "until": None,
    }
    if warmup < stage.warmup_steps and warmup > 0:
        changes["peak_lr"] = stage.peak_lr * warmup / stage.warmup_steps
    if stage.schedule in OPEN_SCHEDULES:
        changes |= {"decay_steps": decay} if decay else {"schedule": "constant", "decay_steps": None}
    if stage.evaluate:
        changes["evaluate"] = [{k: v for k, v in item.items() if k != "every"} for item in values["evaluate"]]
    if stage.teacher not in names:
        changes["teacher"] = place(stage.teacher)
    changes["students"] = [
        student | {"init": place(student["init"])}
        if student.get("init", "random") not in (*INITIALIZATIONS, *names)
        else student
        for student in values["students"]
    ]
    return {**values, **changes}


def data_values(
    given: Mapping[str, Any], shards: Path | None, sample: Path | None, held_out: float
) -> dict[str, Any]:
    kept = {"window", "cache", "cache_gigabytes", "on_corrupt", "max_quarantined_share"}
    read = {key: value for key, value in given.items() if key in kept}
    if shards is not None:
        return read | {"corpora": [{"name": "text", "shards": str(shards)}]}
    if sample is None:
        return dict(given)
    of_text = {"tokenizer", "seq_len", "packing", "special_tokens"}
    read |= {key: value for key, value in given.items() if key in of_text}
    return read | {"text": [str(sample)], "text_field": "text", "held_out": max(held_out, HELD_OUT)}
