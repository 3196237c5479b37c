"""The files of a run and of its stages: what lies where.

DIR/lease/          which process works in it (see `lease`)
DIR/cluster.json    the processes of the run's own Ray cluster
DIR/run.json        the recipe's result-determining fields, and its data's fingerprints
DIR/set-aside/N/    what `--from STAGE` did again, as it was before
DIR/recipe.yaml     the recipe file as given
DIR/whole-recipe.yaml   the recipe with all its values, as `minilm show` prints it: `extends`, `--set`, defaults
DIR/data/           shards, when the recipe names text
DIR/tokenizer/      of data behind a URL
DIR/quarantine.json damaged blocks that are left out, where data.on_corrupt says so
DIR/teachers/       teachers pulled from a registry or a hub
DIR/stages/STAGE/   one stage (see `StageFolder`)
DIR/evaluation/     a file for each trial of the recipe's evaluation
DIR/report.html, report.md   models side by side
DIR/summary.json    the table of a finished run
DIR/mlflow.db, mlartifacts/, tracking.json   tracking, unless MLFLOW_TRACKING_URI says otherwise
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_SCHEMES = ("s3", "gs")  # of checkpoints that lie behind a URL


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage in the work directory."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "stage.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, or room to work in for a store that is elsewhere."""
        return self.root / "checkpoints"

    def start(self, student: str, key: str) -> Path:
        """A model that a student of the stage starts from, made before its workers begin (`driver.made_starts`)."""
        return self.root / "starts" / f"{student}-{key}"

    @property
    def step_metrics(self) -> Path:
        """Loss terms and speeds by step (JSON lines, append-only)."""
        return self.root / "metrics.jsonl"

    @property
    def heldout_metrics(self) -> Path:
        return self.root / "heldout.jsonl"

    @property
    def system_metrics(self) -> Path:
        """How busy the machine of rank 0 was at the steps that are logged."""
        return self.root / "system.jsonl"

    @property
    def heartbeat(self) -> Path:
        """What rank 0 is doing now; replaced about once a second."""
        return self.root / "heartbeat.json"

    @property
    def attention_maps(self) -> Path:
        """Of teacher and students on one sentence, the mean over heads, for the report."""
        return self.root / "attention_maps.json"

    @property
    def stop_request(self) -> Path:
        """Created by the driver: checkpoint at the next step boundary and return."""
        return self.root / "stop"

    @property
    def failure(self) -> Path:
        """A worker's one-line error that no retry can cure."""
        return self.root / "failure.json"

    def worker_log(self, rank: int) -> Path:
        return self.root / f"worker-{rank}.log"

    @property
    def failed_step(self) -> Path:
        """The rows of the step that an error is about."""
        return self.root / "failed-step.json"

    @property
    def done(self) -> Path:
        return self.root / "done.json"

    @property
    def published(self) -> Path:
        """Registered and described: nothing is left to do for this stage."""
        return self.root / "published.json"

    def student(self, name: str) -> Path:
        """The exported `transformers` folder of a student."""
        return self.root / "students" / name


@dataclass(frozen=True)
class RunFolder:
    """The files of a run: `root` is its work directory."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def whole_recipe(self) -> Path:
        return self.root / "whole-recipe.yaml"

    @property
    def cluster(self) -> Path:
        return self.root / "cluster.json"

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
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def evaluated(self) -> Path:
        """What comes after the stages is done: of which stages, and how."""
        return self.evaluation / "done.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.root / "stages" / name)
