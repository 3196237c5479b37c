"""The work directory: all that a run writes, and the proof that it belongs to this recipe.

DIR/lease/          which process works in it (see `lease`)
DIR/run.json        the recipe's result-determining fields; another recipe is refused
DIR/recipe.yaml     the recipe file as given
DIR/data/           shards, when the recipe names text
DIR/tokenizer/      of data behind a URL
DIR/quarantine.json damaged blocks that are left out, where data.on_corrupt says so
DIR/teachers/       teachers pulled from a registry or a hub
DIR/stages/STAGE/   one stage (see `stage.StageFolder`)
DIR/summary.json    the table of a finished run
DIR/mlflow.db, mlartifacts/, tracking.json   tracking, unless MLFLOW_TRACKING_URI says otherwise
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data_job import DataJob
from orchestrator.errors import UserError
from orchestrator.files import read_json, write_json
from orchestrator.lease import Lease, take
from orchestrator.recipe import Recipe, first_difference
from orchestrator.stage import StageFolder


def default_workdir(recipe_name: str) -> Path:
    """`runs/NAME` here; under `ray job submit`, whose current folder is a temporary copy, in the home folder."""
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return (Path.home() / "minilm-runs" if in_ray_job else Path("runs")) / recipe_name


@dataclass(frozen=True)
class Workdir:
    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        """Of data behind a URL."""
        return self.root / "tokenizer"

    @property
    def quarantine(self) -> Path:
        """Damaged blocks that are left out (data.on_corrupt)."""
        return self.root / "quarantine.json"

    @property
    def teachers(self) -> Path:
        return self.root / "teachers"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.root / "stages" / name)

    def is_finished(self, recipe: Recipe) -> bool:
        """True when this very recipe has run to its end here. Reads only small files."""
        record = read_json(self.run)
        same = record is not None and record["recipe"] == recipe.result_fields()
        return same and self.summary.exists()

    @contextmanager
    def claim(self, recipe: Recipe) -> Iterator[Lease]:
        """Hold the directory for this process and this recipe.

        Raises `UserError` when it belongs to another recipe, `LeaseHeld` when another process works in it.
        """
        try:
            lease = take(self.root / "lease")
        except OSError as error:
            raise UserError(
                f"cannot use {self.root} as work directory: {error.strerror}; give another --workdir"
            ) from error
        try:
            self.check_recipe(recipe)
            yield lease
        finally:
            lease.release()

    def adopt(self, recipe: Recipe, recipe_file: Path, data: DataJob) -> None:
        """Make the directory this recipe's for good; called once its inputs have been found sound.

        Raises `UserError` where the data are not those that the run here began with.
        """
        fingerprints = [corpus.fingerprint for corpus in data.corpora]
        before = (read_json(self.run) or {}).get("data", fingerprints)
        for corpus, old in zip(data.corpora, before, strict=True):
            if corpus.fingerprint != old:
                raise UserError(
                    f"data set {corpus.place} was replaced: its fingerprint is {corpus.fingerprint[:16]}…, the run in "
                    f"{self.root} began with {old[:16]}…; put the right one back, or give another --workdir"
                )
        write_json(self.run, {"recipe": recipe.result_fields(), "data": fingerprints})
        copy = self.root / "recipe.yaml"
        if not (copy.exists() and copy.samefile(recipe_file)):
            shutil.copyfile(recipe_file, copy)

    def check_recipe(self, recipe: Recipe) -> None:
        record = read_json(self.run)
        if record is None:
            return
        difference = first_difference(record["recipe"], recipe.result_fields())
        if difference:
            path, old, new = difference
            raise UserError(
                f"work directory {self.root} belongs to another recipe: {path} is {old!r} there and {new!r} now; "
                f"give another --workdir, or delete this one to start again"
            )
