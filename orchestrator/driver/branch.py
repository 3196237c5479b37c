"""`--from STAGE@STEP`: a stage is done again from one of its checkpoints, with another end.

Schedules wsd and constant have the same rates before a decay, wherever that begins. So a checkpoint from before the
decay is one of every such recipe that differs in its end alone, and what comes out has the bits of a run from step 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilm.orchestrator.checkpoint.store import CheckpointStore, step_of
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.changes import first_difference, told
from minilm.orchestrator.recipe.schema import trunk_fields
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import MetricsFile, read_all_metrics


def split_from(redo_from: str | None) -> tuple[str | None, int | None]:
    """(stage, step) of what `--from` was given: STAGE or STAGE@STEP."""
    stage, mark, step = (redo_from or "").partition("@")
    if mark and not (stage and step.isdecimal()):
        given = f"{step!r} as step" if stage else "no stage"
        raise UserError(f"--from {redo_from}: given {given}; allowed: STAGE, or STAGE@STEP as small@2000")
    return stage or None, int(step) if mark else None


def branch_checkpoint(
    store: CheckpointStore, old: Mapping[str, Any], new: Mapping[str, Any], step: int
) -> str:
    """The name of the checkpoint of `step` that stage `new` can go on from. `old`: the stage that made it; both as a
    run's record has them. Raises `UserError` where there is none, or its steps are others than `new`'s."""
    what = f"--from {new['name']}@{step}"
    trunks = trunk_fields(old), trunk_fields(new)
    if not all(trunks):
        raise UserError(
            f"{what}: the rates of stage {new['name']} depend on where it ends, now or before; allowed with schedule "
            f"wsd or constant; give --from {new['name']}"
        )
    if difference := first_difference(*trunks):
        raise UserError(
            f"{what}: {told('stages.' + new['name'], difference)}; only steps, schedule, decay_steps and until may "
            f"differ; give --from {new['name']}"
        )
    last = new["steps"] - (new.get("decay_steps") or 0)
    found = {step_of(name): name for name in store.names()}
    sound = [s for s, name in found.items() if s <= last and _before_a_decay(store, name)]
    if step not in sound:
        why = "there is no checkpoint of this step"
        if step in found:
            why = "the learning rate has begun to fall there, or it is damaged"
            if step > last:
                why = f"the decay begins at step {last}; give more steps"
        there = ", ".join(map(str, sound)) or "none; compute.keep_every_steps keeps some"
        raise UserError(f"{what}: {why}; allowed: {there}")
    return found[step]


def _before_a_decay(store: CheckpointStore, name: str) -> bool:
    from minilm.orchestrator.checkpoint.format import DAMAGE, parse_meta  # takes torch along

    try:
        return bool(parse_meta(store.read_meta(name)).get("trunk"))
    except DAMAGE:
        return False


def begin_branch(stage: StageFolder, store: CheckpointStore, name: str) -> None:
    """Make the stage's folder anew beside it, from a checkpoint of its own and what was logged up to there."""
    shutil.rmtree(new := beside(stage), ignore_errors=True)
    new.mkdir(parents=True)
    if stage.spec.exists():  # it says where the checkpoints are
        shutil.copyfile(stage.spec, StageFolder(new).spec)
    if Path(store.where) == stage.checkpoints:
        shutil.copytree(stage.checkpoints / name, StageFolder(new).checkpoints / name)
    for path in (stage.step_metrics, stage.heldout_metrics, stage.system_metrics):
        with MetricsFile(new / path.name) as points:
            for point in read_all_metrics(path):
                if point.step <= step_of(name):
                    points.append(point.step, point.metrics)


def end_branch(stage: StageFolder) -> None:
    """Put the new folder in the place of the old one, which has been set aside."""
    beside(stage).rename(stage.root)


def is_branching(stage: StageFolder) -> bool:
    """Was a process killed when the old folder was set aside, and the new one not in its place yet?"""
    return beside(stage).exists() and not stage.root.exists()


def beside(stage: StageFolder) -> Path:
    return stage.root.with_name(f".{stage.root.name}.branch")
