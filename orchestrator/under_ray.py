"""What Ray Train runs of ours: the function of its workers, and a callback in its controller.

The callback has two duties. It ends a run whose workers start again and again without a sign of life: deaths at a
step and errors of the start-up are counted by the workers (`attempts`), this is for what they can't count, such as a
folder that they can't write. And before Ray replaces healthy workers, to resize their group, it has them save at the
next step boundary and leave; Ray would end them without a word.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    RayTrainCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState

from orchestrator.errors import InfrastructureError
from orchestrator.files import read_json
from orchestrator.guards import LONG
from orchestrator.reporting import log_to_file, run_reporting
from orchestrator.stage import StageFolder, StageJob

log = logging.getLogger(__name__)

SILENT_STARTS = 5

# of this worker process, which serves one group only: a request can't reach the next one
asked_to_leave = threading.Event()
has_left = threading.Event()


class Trainer(TorchTrainer):
    """Without the actor for Ray's data sets, which nobody uses here: 1.8 s of processor time and 200 MB a start."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


def train_function(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    job = StageJob.from_json(config["job"])
    log_to_file(job)
    try:
        run_reporting(job, eviction_announced=eviction_announced)
    finally:
        has_left.set()


def eviction_announced() -> bool:
    """In a worker: is its group about to be replaced, or a node of it drained?

    Ray's watcher tells every rank of the latter. Its public `get_preemption_info` is a collective of 5-9 ms; the
    ranks agree on this with the sums of their step.
    """
    return asked_to_leave.is_set() or get_train_context().preemption_context.preemption_info is not None


def leave(seconds: float) -> bool:
    """In a worker, beside the thread that trains: ask it to save and end. False if it has not within `seconds`."""
    asked_to_leave.set()
    return has_left.wait(seconds)


def controller_callback(job: StageJob) -> ControllerCallback:
    return Callback(job)


class Callback(ControllerCallback, WorkerGroupCallback):
    """Of one attempt; Ray's controller runs it and waits for each call."""

    def __init__(self, job: StageJob):
        self.job = job
        self.beat: Any = None
        self.starts = 0
        self.reason = "nothing that they told"
        self.group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        beat = read_json(StageFolder(Path(self.job.folder)).heartbeat)
        if beat != self.beat:
            self.beat, self.starts = beat, 0
        if self.starts >= SILENT_STARTS:
            raise InfrastructureError(
                f"stage {self.job.stage}: its workers died {self.starts} times in a row without a sign of life, at "
                f"last because of {self.reason}; the same command goes on from the last checkpoint"
            )

    def after_worker_group_start(self, worker_group: Any) -> None:  # and not before: places may be waited for
        self.starts += 1
        self.group = worker_group

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        for error in worker_group_status.errors.values():
            cause = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", error)
            self.reason = " ".join(str(cause).split())[:500]
            break

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Have healthy workers leave before they are replaced; whatever goes wrong with that, Ray goes on.

        The main rank alone is asked, as the ranks agree on it and it saves. No heartbeats are looked at: the answer
        comes as well when its process ends, which its watchdog and the driver see to where it stands still.
        """
        if not isinstance(current_state, ResizingState):
            return
        seconds = self.job.stall_seconds * LONG  # as long as a save may take
        try:
            answer = self.group.execute_single_async(0, leave, seconds)
            if not ray.get(answer, timeout=seconds):
                log.warning("stage %s: the workers have not saved before the resize", self.job.stage)
        except Exception as error:  # it has died meanwhile, its node is away
            log.warning("stage %s: the workers could not save before the resize: %s", self.job.stage, error)
