"""What Ray Train runs of ours: the function of its workers, and a callback in its controller.

The callback has three duties. It ends a run whose workers start again and again without a sign of life: deaths at a
step and errors of the start-up are counted by the workers (`attempts`), this is for what they can't count, such as a
folder that they can't write. Before Ray replaces healthy workers, to resize their group, it has them save at the next
step boundary and leave; Ray would end them without a word. And it leaves nodes that do not answer out of a new group:
Ray knows of a node's death only after 15 s of health checks, and its elastic policy up to 20 s later.
"""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    RayTrainCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.util.placement_group import NODE_ID_LABEL_KEY

from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.text import one_line
from minilm.orchestrator.worker.error_file import log_to_file, run_reporting

log = logging.getLogger(__name__)

SILENT_STARTS = 5
NODE_SECONDS = 2.0  # for a node to accept a connection
BELIEF_SECONDS = 25.0  # beside the start of a group: how long Ray goes on counting a dead node

# of this worker process, which serves one group only: a request can't reach the next one
asked_to_leave = threading.Event()
has_left = threading.Event()


class Trainer(TorchTrainer):
    """Without the actor for Ray's data sets, which nobody uses here: 1.8 s of processor time and 200 MB a start.

    On a cluster of the run's own (not `joined`) also without the actor that gives its places back when the controller
    dies: they end with the driver, the actor asks a dashboard that such a cluster has not, and its waiting takes 0.7 %
    of a processor.
    """

    def __init__(self, *arguments: Any, joined: bool, **options: Any):
        super().__init__(*arguments, **options)
        self.unused = (DatasetsCallback,) if joined else (DatasetsCallback, PlacementGroupCleanerCallback)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, self.unused)]


def train_function(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    spec = StageSpec.from_json(config["spec"])
    log_to_file(spec)
    try:
        run_reporting(spec, eviction_announced=eviction_announced)
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


def answers(node: dict[str, Any]) -> bool:
    """Does the node's raylet accept a connection? `node`: as `ray.nodes` describes one that Ray takes for alive."""
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=NODE_SECONDS).close()
    except OSError:
        return False
    return True


class Callback(ControllerCallback, WorkerGroupCallback):
    """Of one attempt with at least `least` workers, a `place` each; Ray's controller waits for each call."""

    def __init__(self, spec: StageSpec, place: str, least: int):
        self.spec, self.place, self.least = spec, place, least
        self.silent_nodes: list[str] = []
        self.beat: Any = None
        self.starts = 0
        self.reason = "nothing that they told"
        self.group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        beat = self.beat
        with suppress(OSError, ValueError):  # a shared file system, between two of its versions
            beat = read_json(StageFolder(Path(self.spec.folder)).heartbeat)
        if beat != self.beat:
            self.beat, self.starts = beat, 0
        if self.starts >= SILENT_STARTS:
            raise InfrastructureError(
                f"stage {self.spec.stage}: its workers died {self.starts} times in a row without a sign of life, at "
                f"last because of {self.reason}; the same command goes on from the last checkpoint"
            )

    def after_worker_group_start(self, worker_group: Any) -> None:  # and not before: places may be waited for
        self.starts += 1
        self.group = worker_group
        if self.silent_nodes:  # else Ray would soon resize it by what it still believes
            state = worker_group.get_worker_group_state()
            worker_group._worker_group_state = replace(state, start_time=state.start_time + BELIEF_SECONDS)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        for error in worker_group_status.errors.values():
            cause = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", error)
            self.reason = one_line(cause, 500)
            break

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Have healthy workers leave before they are replaced; whatever goes wrong with that, Ray goes on.

        The main rank alone is asked, as the ranks agree on it and it saves. No heartbeats are looked at: the answer
        comes as well when its process ends, which its watchdog and the driver see to where it stands still.
        """
        if not isinstance(current_state, ResizingState):
            return
        seconds = self.spec.runtime.stall_seconds  # and not longer: Ray looks at no worker meanwhile
        try:
            answer = self.group.execute_single_async(0, leave, seconds)
            if not ray.get(answer, timeout=seconds):
                log.warning("stage %s: the workers have not saved before the resize", self.spec.stage)
        except Exception as error:  # it has died meanwhile, its node is away
            log.warning("stage %s: the workers could not save before the resize: %s", self.spec.stage, error)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Make do with the nodes that answer, if the run may have so few workers; else Ray's count stands."""
        try:
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(self.place)]
        except Exception as error:  # whatever Ray raises while its head is away
            log.warning("stage %s: the nodes could not be counted: %s", self.spec.stage, error)
            return
        there = [node for node in nodes if answers(node)]
        self.silent_nodes = [node["NodeID"] for node in nodes if node not in there]
        places = sum(int(node["Resources"][self.place]) for node in there)
        if self.least <= places < resize_decision.num_workers:
            resize_decision.num_workers = places

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Labels of the nodes where the workers may be."""
        return {NODE_ID_LABEL_KEY: f"!in({','.join(self.silent_nodes)})"} if self.silent_nodes else None
