"""The work directory of a run: who may work in it, and the proof that it belongs to this recipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.checkpoint.store import CheckpointStore
from minilm.orchestrator.driver.branch import (
    begin_branch,
    branch_checkpoint,
    end_branch,
    is_branching,
    split_from,
)
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.changes import invalidated_stages, shared_changes, text_changed, told
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.files import read_json, write_atomic, write_json
from minilm.orchestrator.system.lease import Lease, take


def default_workdir(recipe_name: str) -> Path:
    """`runs/NAME` here; under `ray job submit`, whose current folder is a temporary copy, in the home folder."""
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return (Path.home() / "minilm-runs" if in_ray_job else Path("runs")) / recipe_name


class Workdir(RunFolder):
    """The folder of one run, with what may be done in it."""

    def is_finished(self, recipe: Recipe) -> bool:
        """True when this very recipe has run to its end here. Reads only small files."""
        record = read_json(self.run)
        same = record is not None and record["recipe"] == recipe.result_fields()
        return same and self.summary.exists()

    def is_wound_up(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do after the stages: of `evaluation`, `promote` and `card`."""
        return not self.asked_after(recipe) or read_json(self.evaluated) == self.wound_up_as(recipe)

    def asked_after(self, recipe: Recipe) -> dict[str, Any]:
        """The sections of what comes after the stages, as far as the recipe has them."""
        sections = {"evaluation": recipe.evaluation, "promote": recipe.promote}
        found = {name: section.model_dump(mode="json") for name, section in sections.items() if section}
        card = recipe.stated.model_dump(mode="json", exclude_none=True)
        return found | ({"card": card} if card else {})

    def wound_up_as(self, recipe: Recipe) -> dict[str, Any]:
        """What a winding up that is done is of: those sections, and the stages as they are now."""
        stages = {stage.name: read_json(self.stage(stage.name).published) for stage in recipe.stages}
        digests = {name: published and published["digest"] for name, published in stages.items()}
        return self.asked_after(recipe) | {"stages": digests}

    def goes_on(self, recipe: Recipe) -> bool:
        """Has a run begun here, whose inputs were sound then, with a stage left to train? Reads only small files."""
        done = [self.stage(stage.name).done.exists() for stage in recipe.stages]
        return self.run.exists() and not all(done)

    @contextmanager
    def claim(self, recipe: Recipe, redo_from: str | None = None) -> Iterator[Lease]:
        """Hold the directory for this process and this recipe; `redo_from`: do that stage and all behind it again.

        Raises `UserError` when work in it is not this recipe's, `LeaseHeld` when another process works in it.
        """
        try:
            lease = take(self.root / "lease")
        except OSError as error:
            raise UserError(
                f"cannot use {self.root} as work directory: {error.strerror}; give another --workdir"
            ) from error
        try:
            self.settle({"recipe": recipe.result_fields()}, redo_from)
            yield lease
        finally:
            lease.release()

    def settle(self, new: Mapping[str, Any], redo_from: str | None) -> None:
        """Make sure that all work here is `new`'s (a record, see `changes`), setting aside what is to be done again."""
        old = read_json(self.run)
        stage, step = split_from(redo_from)
        redone = self.check(old, new, stage)
        if old is None:
            if step is not None:
                raise UserError(f"--from {redo_from}: no stage has begun in {self.root}; leave it out")
            return
        goes_on = (
            old.get("from") == redo_from and old["recipe"] == new["recipe"] and not self.summary.exists()
        )
        if redone and not goes_on:
            kept = ""
            if stage is not None and step is not None and not is_branching(self.stage(stage)):
                if changes := shared_changes(old, new):
                    raise UserError(f"--from {redo_from}: {changes[0]}; give --from {stage}")
                before, now = ({s["name"]: s for s in record["recipe"]["stages"]} for record in (old, new))
                store = self.checkpoints(stage)
                kept = branch_checkpoint(store, before.get(stage, now[stage]), now[stage], step)
                begin_branch(self.stage(stage), store, kept)
            for name in redone:
                self.set_aside_elsewhere(name, but=kept)
            self.set_aside([*(self.stage(name).root for name in redone), self.summary, self.evaluated])
            if stage is not None and step is not None:
                end_branch(self.stage(stage))
        self.set_aside(
            [self.stage(name).root for name in invalidated_stages(old, new) if not self.begun(name)]
        )
        if text_changed(old, new):
            self.set_aside([self.data])

    def check(
        self, old: Mapping[str, Any] | None, new: Mapping[str, Any], redo_from: str | None
    ) -> list[str]:
        """The stages to be done again. Raises `UserError` for work that `new` invalidates and `redo_from` keeps."""
        names = [stage["name"] for stage in new["recipe"]["stages"]]
        if redo_from is not None and redo_from not in names:
            raise UserError(f"--from {redo_from}: the recipe has no such stage; allowed: {', '.join(names)}")
        redone = names[names.index(redo_from) :] if redo_from else []
        if old is None:
            return redone
        if old["recipe"]["name"] != new["recipe"]["name"]:
            what = told("name", ("", old["recipe"]["name"], new["recipe"]["name"]))
            raise UserError(
                f"work directory {self.root} belongs to another recipe: {what}; give another --workdir"
            )
        why = invalidated_stages(old, new)
        if kept := [name for name in why if name not in redone and self.begun(name)]:
            raise UserError(self._refusal(kept, why[kept[0]], redo_from))
        return redone

    def _refusal(self, kept: Sequence[str], why: str, redo_from: str | None) -> str:
        stages = f"stage{'s' if len(kept) > 1 else ''} {', '.join(kept)}"
        if redo_from:
            return (
                f"--from {redo_from} keeps {stages}, which this recipe changes: {why}; give --from {kept[0]}, or "
                f"another --workdir"
            )
        return (
            f"work directory {self.root} holds work of {stages} that this recipe changes: {why}; --from {kept[0]} does "
            f"it again, with all stages behind it (what is there goes to set-aside/), or give another --workdir"
        )

    def begun(self, name: str) -> bool:
        """Is there work of a stage that a change would make useless?"""
        return self.stage(name).done.exists() or bool(self.checkpoints(name).names())

    def checkpoints(self, name: str) -> CheckpointStore:
        """Where a stage's are: here, or where its last attempt put them."""
        stage = self.stage(name)
        return open_store((read_json(stage.spec) or {}).get("checkpoints"), stage.checkpoints)

    def set_aside_elsewhere(self, name: str, *, but: str) -> None:
        """The checkpoints of a stage that are not in this directory, but for one."""
        if (read_json(self.stage(name).spec) or {}).get("checkpoints"):
            store = self.checkpoints(name)
            for checkpoint in store.names():
                if checkpoint != but:
                    store.set_aside(checkpoint)

    def set_aside(self, paths: Sequence[Path]) -> None:
        """Move what exists of `paths` to a new folder, DIR/set-aside/NUMBER, and say so."""
        there = [path for path in paths if path.exists()]
        if not there:
            return
        aside = self.root / "set-aside"
        numbers = [int(path.name) for path in aside.glob("*") if path.name.isdecimal()]
        folder = aside / f"{max(numbers, default=0) + 1:03d}"
        for path in there:
            target = folder / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        moved = ", ".join(str(path.relative_to(self.root)) for path in there)
        print(f"set aside in {folder}: {moved}", file=sys.stderr)

    def adopt(
        self, recipe: Recipe, recipe_file: Path, data: DataSpec, redo_from: str | None = None, whole: str = ""
    ) -> None:
        """Make the directory this recipe's for good; called once its inputs have been found sound.

        Raises `UserError` where the data are not those that work here was made from.
        """
        pinned = [[corpus.place, corpus.fingerprint] for corpus in data.corpora]
        new: dict[str, Any] = {"recipe": recipe.result_fields(), "data": pinned}
        old = read_json(self.run)
        self.check(old, new, split_from(redo_from)[0])
        going_on = redo_from
        if old and old["recipe"] != new["recipe"]:
            self.summary.unlink(missing_ok=True)  # of fewer stages, or of others
        elif old:
            going_on = redo_from or old.get("from")  # `--from`, killed, may be repeated with and without it
        write_json(self.run, new | {"from": going_on})
        copy = self.root / "recipe.yaml"
        if not (copy.exists() and copy.samefile(recipe_file)):
            shutil.copyfile(recipe_file, copy)
        if whole:
            write_atomic(self.whole_recipe, whole)
