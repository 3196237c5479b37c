"""MLflow runs: one parent run for the recipe, a child run for each stage, and all that is told to them.

What is told (parameters, tags, files, the end of a run) is first noted in WORKDIR/tracking.json and struck
off when MLflow has it, so that neither a dead driver nor a server that is away loses anything: the next
contact, or the next run with the same work directory, tells the rest. Every note can be told twice without
harm. Points take the way of `uploader`, run ids are found by `mlflow_runs`. Leaves out: the models (`registry`).
"""

import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.metrics_file import Point
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.text import one_line, shown
from minilm.orchestrator.system.versions import flatten, git_commit, package_tags
from minilm.orchestrator.tracking.client import MlflowClient, is_missing, patiently, tracking_uri
from minilm.orchestrator.tracking.pending import STATE_FILE, num_pending
from minilm.orchestrator.tracking.runs import MlflowRuns
from minilm.orchestrator.tracking.uploader import Uploader

# isort: split
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

_MAX_PARAM_CHARS = 6000  # mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
_FOR_GOOD = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
_ENDED = ("FINISHED", "FAILED", "KILLED")


def flush_pending(workdir: Path, experiment: str) -> int:
    """Tells MLflow what an ended run could not, and nothing else; returns how many notes remain.

    For a work directory that is done, by whoever holds its lock. Any trouble is one warning, never an error, and
    leaves the notes for the next time: MLflow is away, or MLFLOW_TRACKING_URI names another one than the run's.
    """
    if not num_pending(workdir):
        return 0
    uri = tracking_uri(workdir)
    if is_missing(uri):
        return _not_there(workdir, uri)
    tracking = Tracking(workdir, uri, experiment)
    with tracking.runs.lock:
        try:
            run_id = tracking.runs.state["runs"].get("")
            if run_id is not None and tracking.runs.lifecycle(run_id) is None:
                return _not_there(workdir, uri)
            tracking.runs.find_again()
        except Exception as error:
            tracking._warn(error)
            return tracking.num_pending
        return tracking.tell(at_once=True)


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
        self._away = False
        self._quiet_until = 0.0

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
        versions and commit are added. UserError if a new run finds no MLflow; a run that goes on can wait
        for it.
        """
        tracking = cls(workdir, tracking_uri(workdir), experiment)
        with tracking.runs.lock:
            try:
                tracking.runs.find_again()
                tracking.runs.of("", name)
            except UserError:
                raise
            except Exception as error:
                if not tracking.runs.state["runs"]:
                    raise UserError(
                        f"MLflow at {shown(tracking.uri)} does not answer ({one_line(error)}): start it, or unset "
                        "MLFLOW_TRACKING_URI to keep the run in the work directory"
                    ) from error
                tracking._warn(error)
            commit = git_commit()
            known = {"mlflow.source.name": "minilm run", "mlflow.source.type": "LOCAL", **package_tags()}
            known |= {"mlflow.source.git.commit": commit} if commit else {}
            tracking._note("", name, params=flatten(params), tags={**known, **tags}, status="RUNNING")
            if recipe_file is not None:
                tracking._note("", name, artifact=[str(recipe_file.resolve()), "recipe"])
            tracking.tell()
        return tracking

    @property
    def client(self) -> MlflowClient:
        return self.runs.client

    @property
    def num_pending(self) -> int:
        """Notes that MLflow has not been told."""
        return len(self.runs.state["notes"])

    @property
    def run_id(self) -> str:
        """Of the parent run, which `open` made or found."""
        return str(self.runs.state["runs"][""])

    def stage(self, name: str, params: Mapping[str, Any]) -> "StageRun":
        """The child run of one stage; does not fail or wait when MLflow is away.

        The run this stage had before goes on, unless its points files are gone: somebody removed the stage's
        folder to train it again, and those are other points.
        """
        with self.runs.lock:
            sent = self.runs.state["sent"].get(name)
            if sent and not any((self.runs.workdir / file).exists() for file in sent):
                if not any(self.runs.workdir.glob(f"set-aside/*/stages/{name}")):  # where `--from` puts them
                    log.warning("the points of stage %s are gone: it gets a new run in MLflow", name)
                self.runs.renew(name)
        self._note(name, name, params=flatten(params), status="RUNNING")
        self.tell()
        return StageRun(self, name)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tags the recipe's run, for example with the data fingerprint as soon as the data is built."""
        self._note("", "", tags=dict(tags))
        self.tell()

    @property
    def look(self) -> str:
        """How a person sees the runs: an address, or the command that serves the store; never a password."""
        if self.uri.startswith("http"):
            return f"{shown(self.uri).rstrip('/')}/#/experiments/{self.runs.state['experiment_id']}/runs/{self.run_id}"
        if shown(self.uri) != self.uri:  # works where the variable is set, as it was for the run
            return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def finish(self, status: str = "FINISHED") -> int:
        """Ends the recipe's run as FINISHED, FAILED or KILLED (resumable); how many notes are num_pending."""
        self._note("", "", status=_checked(status))
        return self.tell(at_once=True)

    def tell(self, *, at_once: bool = False) -> int:
        """Tells MLflow, in order, what it has not been told; returns how many notes are left (it is away).

        After a call that failed slowly it is left alone for as long again, unless `at_once`: a server that
        lets every call time out holds up the end of a stage for half a minute, not for many.
        """
        with self.runs.lock:
            began = time.monotonic()
            if began < self._quiet_until and not at_once:
                return self.num_pending
            try:
                while self.runs.state["notes"]:
                    note = self.runs.state["notes"][0]
                    try:
                        self._tell_one(note)
                    except MlflowException as error:
                        if error.error_code not in _FOR_GOOD:
                            raise
                        if self.runs.find_again():  # somebody deleted the run: the note goes to a new one
                            self._tell_one(note)
                        else:
                            self._warn_refused(note, error)
                    del self.runs.state["notes"][0]
                    self.runs.save()
            except Exception as error:
                self._warn(error)
                now = time.monotonic()
                self._quiet_until = now + (now - began)
            else:
                self._away = False
            return self.num_pending

    def _warn(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            log.warning(
                "MLflow at %s could not be told; what is left stays in %s and is told later (%s)",
                shown(self.uri),
                self.runs.path,
                one_line(error),
            )

    def _warn_refused(self, note: dict[str, Any], error: Exception) -> None:
        whose = f"stage {note['run']}" if note["run"] else "the recipe"
        what = ", ".join(key for key in note if key not in ("run", "name"))
        log.warning(
            "MLflow at %s refuses the %s of %s for good; it goes on without (%s)",
            shown(self.uri),
            what,
            whose,
            one_line(error),
        )

    def _note(self, run: str, name: str, **what: Any) -> None:
        with self.runs.lock:
            self.runs.state["notes"].append({"run": run, "name": name, **what})
            self.runs.save()

    def _tell_one(self, note: dict[str, Any]) -> None:
        run_id = self.runs.of(note["run"], note["name"])
        if "params" in note or "tags" in note:
            known = self.client.get_run(run_id).data.params
            params = {key: value[:_MAX_PARAM_CHARS] for key, value in note.get("params", {}).items()}
            changed = {
                f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value
            }
            tags = {
                **note.get("tags", {}),
                **changed,
            }  # MLflow's parameters are for ever: a change becomes a tag
            new = [Param(key, value) for key, value in params.items() if key not in known]
            self.client.log_batch(
                run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items()]
            )
        if "points" in note:
            self._uploader(note["run"], [Path(file) for file in note["points"]]).drain()
        if "artifact" in note:
            path, folder = Path(note["artifact"][0]), note["artifact"][1] or None
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            elif path.exists():
                self.client.log_artifact(run_id, str(path), folder)
            else:
                log.warning("%s is gone and was not copied to MLflow", path)
        if "status" in note and self.client.get_run(run_id).info.status != note["status"]:
            if note["status"] in _ENDED:
                self.client.set_terminated(run_id, note["status"])
            else:
                self.client.update_run(run_id, note["status"])

    def _uploader(self, stage: str, files: Sequence[Path]) -> Uploader:
        def send(points: list[Point]) -> None:
            metrics = [
                Metric(name, value, point.time_ms, point.step)
                for point in points
                for name, value in point.metrics.items()
            ]
            self.client.log_batch(self.runs.of(stage, stage), metrics=metrics)
            with self.runs.lock:
                if stage not in self.runs.state["sent"]:
                    self.runs.state["sent"][stage] = [
                        os.path.relpath(file, self.runs.workdir.resolve()) for file in files
                    ]
                    self.runs.save()

        # Key and take in the name: another server, or a new run there, knows nothing yet and gets every point.
        name = f"uploaded-{self.runs.state['key'][:8]}{self.runs.take(stage, '-{}')}.json"
        return Uploader(files, send, files[0].parent / name)


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
        self._uploader = self._tracking._uploader(self.name, self._files).start()
        return self._uploader

    def tag(self, tags: Mapping[str, str]) -> None:
        self._tracking._note(self.name, self.name, tags=dict(tags))
        self._tracking.tell()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copies a file or a folder to this stage's run."""
        self._tracking._note(self.name, self.name, artifact=[str(path.resolve()), folder])
        self._tracking.tell()

    def finish(self, status: str = "FINISHED", timeout_seconds: float = 30.0) -> int:
        """Sends the last points and ends the run as FINISHED, FAILED or KILLED (resumable).

        Returns how many notes are still num_pending. When this returns, what is left is on disk and will be told
        by the next run with this work directory: mark the stage as done after it, not before.
        """
        if self._uploader is not None:
            self._uploader.close(timeout_seconds)
            self._uploader = None
        if self._files:
            self._tracking._note(self.name, self.name, points=[str(file) for file in self._files])
        self._tracking._note(self.name, self.name, status=_checked(status))
        return self._tracking.tell(at_once=True)


def _checked(status: str) -> str:
    if status not in _ENDED:
        raise ValueError(f"status {status!r}: a run ends as one of {', '.join(_ENDED)}")
    return status
