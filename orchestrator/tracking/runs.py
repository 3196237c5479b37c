"""Which MLflow run is whose: one for the recipe, a child for each stage, found again after any death.

Their ids lie in WORKDIR/tracking.json beside the notes that MLflow has not been told (`outbox`), so a resumed run
goes on in the same MLflow runs. A run carries the work directory's key as a tag: where the file was not saved in
time, it is found by that.
"""

import logging
import threading
from functools import cached_property
from pathlib import Path

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.text import shown
from minilm.orchestrator.tracking.client import MlflowClient, MlflowException, connect
from minilm.orchestrator.tracking.pending import STATE_FILE, State

log = logging.getLogger(__name__)


class MlflowRuns:
    """The runs of one work directory. `state` is what the file holds; change it under `lock`."""

    def __init__(self, workdir: Path, uri: str, experiment: str):
        self.workdir, self.uri, self._experiment = workdir, uri, experiment
        self.path = workdir / STATE_FILE
        self.lock = threading.RLock()
        try:
            self.state = State.read(self.path)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: remove it, and the run gets new MLflow runs") from error

    @cached_property
    def client(self) -> MlflowClient:
        """Made when it is first used, because a file that another process has locked is as good as away."""
        return connect(self.uri)

    def save(self) -> None:
        self.state.write(self.path)

    def of(self, run: str, name: str) -> str:
        """The id of the run ("" is the parent), found by our own tag or made; raises if MLflow is away."""
        with self.lock:
            if run in self.state.runs:
                return str(self.state.runs[run])
            self.save()  # the key must be on disk before a run carries it
            experiment_id = self._find_experiment()
            tags = {"minilm.workdir": self.state.key, "minilm.run": "recipe"}
            if run:
                tags["minilm.run"] = f"stage {run}{self.take(run, ' take {}')}"
                tags["mlflow.parentRunId"] = self.of("", "")
            query = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in ("minilm.workdir", "minilm.run"))
            found = self.client.search_runs([experiment_id], query, max_results=1)
            made = (
                found[0] if found else self.client.create_run(experiment_id, tags=tags, run_name=name or None)
            )
            self.state.runs[run] = made.info.run_id
            self.save()
            return str(made.info.run_id)

    def find_again(self) -> bool:
        """Forgets runs that this MLflow does not have: it is another server, or they were deleted there.

        True if there was one. Without the recipe's run all are forgotten; without a stage's, that one.
        """
        gone = [run for run, id_ in sorted(self.state.runs.items()) if self.lifecycle(id_) != "active"]
        for run in gone:
            run_id = self.state.runs[run]
            log.warning(
                "run %s of %s is not at %s: a new one is made there", run_id, self.path, shown(self.uri)
            )
            if run == "":
                self.state.forget_runs()
                break
            self.renew(run)
        if gone:
            self.save()
        return bool(gone)

    def renew(self, stage: str) -> None:
        """Forgets the run of a stage: the next is made anew and gets every point (see `take`)."""
        self.state.runs.pop(stage, None)
        self.state.sent.pop(stage, None)
        self.state.takes[stage] = self.state.takes.get(stage, 1) + 1

    def take(self, run: str, form: str) -> str:
        """What tells the runs apart that a stage had after another: nothing for the first, then 2, 3, …"""
        take = self.state.takes.get(run, 1)
        return form.format(take) if take > 1 else ""

    def lifecycle(self, run_id: str) -> str | None:
        """ "active" or "deleted"; None where MLflow has no such run."""
        try:
            return str(self.client.get_run(run_id).info.lifecycle_stage)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _find_experiment(self) -> str:
        """The id of the experiment of the parent run, whatever the recipe calls it by now; made if it is new."""
        if self.state.experiment_id is not None:
            return str(self.state.experiment_id)
        found = self.client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(
                    f"experiment {self._experiment!r} was deleted at {shown(self.uri)}: restore it there, or choose "
                    "another name with --set tracking.experiment=NAME"
                )
            self.state.experiment_id = found.experiment_id
        else:
            local = self.uri.startswith("sqlite:")
            artifacts = (self.workdir.resolve() / "mlartifacts").as_uri() if local else None
            made = self.client.create_experiment(self._experiment, artifact_location=artifacts)
            self.state.experiment_id = made
        return str(self.state.experiment_id)
