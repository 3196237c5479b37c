"""The outbox of a work directory: everything meant for MLflow is noted on disk first, and struck off once it is sent.

So neither a dead driver nor a server that is away loses anything: the next contact, or the next run with the same work
directory, sends the rest. Every note can be sent twice without harm. Metrics go by way of `uploader`.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.metrics_file import Point
from minilm.orchestrator.system.text import one_line, shown
from minilm.orchestrator.tracking.calls import refusal
from minilm.orchestrator.tracking.runs import MlflowRuns
from minilm.orchestrator.tracking.uploader import Uploader

# isort: split
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

_MAX_PARAM_CHARS = 6000  # mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
_MAX_DIGEST_CHARS = 36  # MAX_DATASET_DIGEST_SIZE there
_FOR_GOOD = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
ENDED = ("FINISHED", "FAILED", "KILLED")


def _dataset(name: str, digest: str, place: str, profile: dict[str, Any]) -> DatasetInput:
    source = json.dumps({"uri": place})
    found = Dataset(name, digest[:_MAX_DIGEST_CHARS], "minilm", source, profile=json.dumps(profile))
    return DatasetInput(found, [InputTag("mlflow.data.context", "training")])


class Outbox:
    """Notes for the MLflow runs of one work directory; safe to use from several threads."""

    def __init__(self, runs: MlflowRuns) -> None:
        self.runs = runs
        self._away = False
        self._quiet_until = 0.0

    @property
    def num_pending(self) -> int:
        """How many notes have not been sent."""
        return len(self.runs.state.notes)

    def flush(self, *, at_once: bool = False) -> int:
        """Send what is pending to MLflow, in order; returns how many notes are left (MLflow is away).

        After a call that failed slowly it is left alone for as long again, unless `at_once`: a server that
        lets every call time out holds up the end of a stage for half a minute, not for many.
        """
        with self.runs.lock:
            began = time.monotonic()
            if began < self._quiet_until and not at_once:
                return self.num_pending
            try:
                while self.runs.state.notes:
                    note = self.runs.state.notes[0]
                    try:
                        self._send(note)
                    except MlflowException as error:
                        if error.error_code not in _FOR_GOOD:
                            raise
                        if self.runs.find_again():  # somebody deleted the run: the note goes to a new one
                            self._send(note)
                        else:
                            self._warn_refused(note, error)
                    del self.runs.state.notes[0]
                    self.runs.save()
            except Exception as error:
                self.warn(error)
                now = time.monotonic()
                self._quiet_until = now + (now - began)
            else:
                self._away = False
            return self.num_pending

    def warn(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            log.warning(
                "MLflow at %s could not be told; what is left stays in %s and is told later (%s)",
                shown(self.runs.uri),
                self.runs.path,
                refusal(error) or one_line(error),
            )

    def _warn_refused(self, note: dict[str, Any], error: Exception) -> None:
        whose = f"stage {note['run']}" if note["run"] else "the recipe"
        what = ", ".join(key for key in note if key not in ("run", "name"))
        log.warning(
            "MLflow at %s refuses the %s of %s for good; it goes on without (%s)",
            shown(self.runs.uri),
            what,
            whose,
            one_line(error),
        )

    def add(self, run: str, name: str, **what: Any) -> None:
        with self.runs.lock:
            self.runs.state.notes.append({"run": run, "name": name, **what})
            self.runs.save()

    def _send(self, note: dict[str, Any]) -> None:
        run_id = self.runs.of(note["run"], note["name"])
        if "params" in note or "tags" in note:
            known = self.runs.client.get_run(run_id).data.params
            params = {key: value[:_MAX_PARAM_CHARS] for key, value in note.get("params", {}).items()}
            changed = {
                f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value
            }
            tags = {
                **note.get("tags", {}),
                **changed,
            }  # MLflow's parameters are for ever: a change becomes a tag
            new = [Param(key, value) for key, value in params.items() if key not in known]
            self.runs.client.log_batch(
                run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items()]
            )
        if "metrics" in note:
            metrics = [
                Metric(key, value, note["time_ms"], note["step"]) for key, value in note["metrics"].items()
            ]
            self.runs.client.log_batch(run_id, metrics=metrics)
        if "datasets" in note:
            self.runs.client.log_inputs(run_id, [_dataset(*values) for values in note["datasets"]])
        if "points" in note:
            self.uploader(note["run"], [Path(file) for file in note["points"]]).drain()
        if "artifact" in note:
            path, folder = Path(note["artifact"][0]), note["artifact"][1] or None
            if path.is_dir():
                self.runs.client.log_artifacts(run_id, str(path), folder)
            elif path.exists():
                self.runs.client.log_artifact(run_id, str(path), folder)
            else:
                log.warning("%s is gone and was not copied to MLflow", path)
        if "status" in note and self.runs.client.get_run(run_id).info.status != note["status"]:
            if note["status"] in ENDED:
                self.runs.client.set_terminated(run_id, note["status"])
            else:
                self.runs.client.update_run(run_id, note["status"])

    def uploader(self, stage: str, files: Sequence[Path]) -> Uploader:
        def send(points: list[Point]) -> None:
            metrics = [
                Metric(name, value, point.time_ms, point.step)
                for point in points
                for name, value in point.metrics.items()
            ]
            try:
                self.runs.client.log_batch(self.runs.of(stage, stage), metrics=metrics)
            except Exception as error:
                if words := refusal(error):
                    raise UserError(f"MLflow {words}") from error
                raise
            with self.runs.lock:
                if stage not in self.runs.state.sent:
                    self.runs.state.sent[stage] = [
                        os.path.relpath(file, self.runs.workdir.resolve()) for file in files
                    ]
                    self.runs.save()

        # Key and take in the name: another server, or a new run there, knows nothing yet and gets every point.
        name = f"uploaded-{self.runs.state.key[:8]}{self.runs.take(stage, '-{}')}.json"
        return Uploader(files, send, files[0].parent / name)
