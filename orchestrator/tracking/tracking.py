"""MLflow runs: one parent run for the recipe, a child run for each stage, and what the driver tells them.

The facade of this room for everything but models (`registry`): notes go through `outbox`, metrics through `uploader`,
and `runs` finds the ids of the runs.
"""

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.text import one_line, shown
from minilm.orchestrator.system.versions import flatten, git_commit, package_tags
from minilm.orchestrator.tracking.calls import patiently, refusal
from minilm.orchestrator.tracking.client import MlflowClient, is_missing, tracking_uri
from minilm.orchestrator.tracking.outbox import ENDED, Outbox
from minilm.orchestrator.tracking.pending import STATE_FILE, has_pending
from minilm.orchestrator.tracking.runs import MlflowRuns
from minilm.orchestrator.tracking.uploader import Uploader

log = logging.getLogger(__name__)


def flush_pending(workdir: Path, experiment: str) -> int:
    """Send to MLflow what an ended run could not, and nothing else; returns how many notes remain.

    For a work directory that is done, by whoever holds its lock. Any trouble is one warning, never an error, and
    leaves the notes for the next time: MLflow is away, or MLFLOW_TRACKING_URI names another one than the run's.
    """
    if not has_pending(workdir):
        return 0
    uri = tracking_uri(workdir)
    if is_missing(uri):
        return _not_there(workdir, uri)
    tracking = Tracking(workdir, uri, experiment)
    with tracking.runs.lock:
        try:
            run_id = tracking.runs.state.runs.get("")
            if run_id is not None and tracking.runs.lifecycle(run_id) is None:
                return _not_there(workdir, uri)
            tracking.runs.find_again()
        except Exception as error:
            tracking.outbox.warn(error)
            return tracking.num_pending
        return tracking.flush(at_once=True)


def _not_there(workdir: Path, uri: str) -> int:
    log.warning(
        "the runs of %s are not at %s: set MLFLOW_TRACKING_URI as it was for the run, and the same command tells "
        "MLflow what is left",
        workdir,
        shown(uri),
    )
    return len((read_json(workdir / STATE_FILE) or {}).get("notes", []))


class Tracking:
    """The MLflow runs of one work directory. Made by `open`; safe to use from several threads."""

    def __init__(self, workdir: Path, uri: str, experiment: str) -> None:
        self.uri = uri
        self.runs = MlflowRuns(workdir, uri, experiment)
        self.outbox = Outbox(self.runs)

    @classmethod
    def open(
        cls,
        workdir: Path,
        experiment: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        recipe_file: Path | None = None,
    ) -> "Tracking":
        """Opens the recipe's run, a new one or the one this work directory had before.

        name: of the run. params: the recipe as nested mappings. tags: recipe digest and what else is known;
        versions and commit are added. UserError if MLflow refuses, or if a new run finds none; a run that goes
        on can wait for it.
        """
        tracking = cls(workdir, tracking_uri(workdir), experiment)
        with tracking.runs.lock:
            try:
                tracking.runs.find_again()
                tracking.runs.of("", name)
            except UserError:
                raise
            except Exception as error:
                if words := refusal(error):
                    raise UserError(f"MLflow at {shown(tracking.uri)} {words}") from error
                if not tracking.runs.state.runs:
                    raise UserError(
                        f"MLflow at {shown(tracking.uri)} does not answer ({one_line(error)}): start it, or unset "
                        "MLFLOW_TRACKING_URI to keep the run in the work directory"
                    ) from error
                tracking.outbox.warn(error)
            commit = git_commit()
            known = {"mlflow.source.name": "minilm run", "mlflow.source.type": "LOCAL", **package_tags()}
            known |= {"mlflow.source.git.commit": commit} if commit else {}
            tracking.outbox.add("", name, params=flatten(params), tags={**known, **tags}, status="RUNNING")
            if recipe_file is not None:
                tracking.outbox.add("", name, artifact=[str(recipe_file.resolve()), "recipe"])
            tracking.flush()
        return tracking

    @property
    def client(self) -> MlflowClient:
        return self.runs.client

    @property
    def num_pending(self) -> int:
        """Notes that MLflow has not been told."""
        return self.outbox.num_pending

    def flush(self, *, at_once: bool = False) -> int:
        """See `Outbox.flush`."""
        return self.outbox.flush(at_once=at_once)

    @property
    def run_id(self) -> str:
        """The id of the parent run, which `open` made or found."""
        return str(self.runs.state.runs[""])

    def stage(self, name: str, params: Mapping[str, Any]) -> "StageRun":
        """The child run of one stage; does not fail or wait when MLflow is away.

        The run this stage had before goes on, unless its points files are gone: somebody removed the stage's
        folder to train it again, and those are other points.
        """
        with self.runs.lock:
            sent = self.runs.state.sent.get(name)
            if sent and not any((self.runs.workdir / file).exists() for file in sent):
                if not any(self.runs.workdir.glob(f"set-aside/*/stages/{name}")):  # where `--from` puts them
                    log.warning("the points of stage %s are gone: it gets a new run in MLflow", name)
                self.runs.renew(name)
        self.outbox.add(name, name, params=flatten(params), status="RUNNING")
        self.flush()
        return StageRun(self, name)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tags the recipe's run, for example with the data fingerprint as soon as the data is built."""
        self.outbox.add("", "", tags=dict(tags))
        self.flush()

    def datasets(self, found: Sequence[tuple[str, str, str, Mapping[str, Any]]], stage: str = "") -> None:
        """Notes the data sets that the recipe's run reads, or a stage's: (name, fingerprint, place, profile) each."""
        self.outbox.add(stage, stage, datasets=[[*values[:3], dict(values[3])] for values in found])
        self.flush()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Notes what a stage came to, in the recipe's run, so that recipes can be compared in MLflow's table."""
        self.outbox.add("", "", metrics=dict(values), step=step, time_ms=int(time.time() * 1000))
        self.flush()

    @property
    def look(self) -> str:
        """How a person sees the runs: an address, or the command that serves the store; never a password."""
        if self.uri.startswith("http"):
            return f"{shown(self.uri).rstrip('/')}/#/experiments/{self.runs.state.experiment_id}/runs/{self.run_id}"
        if shown(self.uri) != self.uri:  # works where the variable is set, as it was for the run
            return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def finish(self, status: str = "FINISHED") -> int:
        """Ends the recipe's run as FINISHED, FAILED or KILLED (resumable); how many notes are pending."""
        self.outbox.add("", "", status=_checked(status))
        return self.flush(at_once=True)


class StageRun:
    """The MLflow run of one stage; no method fails or waits long when MLflow is away."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self.name = name
        self._tracking = tracking
        self._uploader: Uploader | None = None
        self._files: list[Path] = []

    @property
    def run_id(self) -> str:
        """Waits for MLflow only if the run has not been made, and a minute at most; then InfrastructureError."""
        return patiently(self._tracking.uri, lambda: self._tracking.runs.of(self.name, self.name), 60.0)

    def follow(self, files: Sequence[Path]) -> Uploader:
        """Starts to send the points of these files, which may not exist yet; `finish` ends it.

        The uploader holds no more than a megabyte of a file at a time, however long MLflow is away.
        """
        self._files = [file.resolve() for file in files]
        self._uploader = self._tracking.outbox.uploader(self.name, self._files).start()
        return self._uploader

    def tag(self, tags: Mapping[str, str]) -> None:
        self._tracking.outbox.add(self.name, self.name, tags=dict(tags))
        self._tracking.flush()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copies a file or a folder to this stage's run."""
        self._tracking.outbox.add(self.name, self.name, artifact=[str(path.resolve()), folder])
        self._tracking.flush()

    def finish(self, status: str = "FINISHED", timeout_seconds: float = 30.0) -> int:
        """Sends the last points and ends the run as FINISHED, FAILED or KILLED (resumable).

        Returns how many notes are still pending. When this returns, what is left is on disk and will be told
        by the next run with this work directory: mark the stage as done after it, not before.
        """
        if self._uploader is not None:
            self._uploader.close(timeout_seconds)
            self._uploader = None
        if self._files:
            self._tracking.outbox.add(self.name, self.name, points=[str(file) for file in self._files])
        self._tracking.outbox.add(self.name, self.name, status=_checked(status))
        return self._tracking.flush(at_once=True)


def _checked(status: str) -> str:
    if status not in ENDED:
        raise ValueError(f"status {status!r}: a run ends as one of {', '.join(ENDED)}")
    return status
