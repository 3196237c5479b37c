"""What Ray Train runs of ours: the function of its workers, and a callback in its controller.

The callback has three duties. It ends a run whose workers start again and again without a sign of life: the workers
count deaths at a step and errors of the start-up (`worker.crash_loop`); this covers what they can't count, such as a
folder that they can't write. Before Ray replaces healthy workers, to resize their group, it has them save at the next
step boundary and leave; Ray would end them without a word. And it leaves nodes that do not answer out of a new group:
Ray knows of a node's death only after 15 s of health checks, and its elastic policy up to 20 s later.
"""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.launch.claims import claimed_by_others
from minilm.orchestrator.launch.ray_private import (
    TrainCallback,
    call_on_rank_zero,
    cause_of,
    delay_resize,
    excluding,
    is_node_drained,
    is_resizing,
)
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.text import one_line
from minilm.orchestrator.worker.error_file import log_to_file, run_reporting

log = logging.getLogger(__name__)

SILENT_STARTS = 5
NODE_SECONDS = 2.0  # for a node to accept a connection
BELIEF_SECONDS = 25.0  # Ray counts a dead node for up to 35 s; the start of a group takes the rest

# of this worker process, which serves one group only: a request can't reach the next one
asked_to_leave = threading.Event()
has_left = threading.Event()


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
    return asked_to_leave.is_set() or is_node_drained()


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


class StageCallback(TrainCallback):
    """The controller's callback for one attempt with at least `least` workers, one `resource` each."""

    def __init__(self, spec: StageSpec, resource: str, least: int):
        self.spec, self.resource, self.least = spec, resource, least
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

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.starts += 1  # counted afterwards: a group may wait for resources before it starts
        self.group = worker_group
        if self.silent_nodes:  # Ray still counts them, and would resize the group to them
            delay_resize(worker_group, BELIEF_SECONDS)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        for error in worker_group_status.errors.values():
            self.reason = one_line(cause_of(error), 500)
            break

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Have healthy workers leave before they are replaced; whatever goes wrong with that, Ray goes on.

        Only rank 0 is asked: the ranks agree on leaving, and rank 0 saves. The answer comes as well when its process
        ends; its watchdog and the driver end it where it stands still.
        """
        if not is_resizing(current_state):
            return
        seconds = self.spec.runtime.stall_seconds  # and not longer: Ray looks at no worker meanwhile
        try:
            if not call_on_rank_zero(self.group, leave, seconds, seconds=seconds):
                log.warning("stage %s: the workers have not saved before the resize", self.spec.stage)
        except Exception as error:  # it has died meanwhile, its node is away
            log.warning("stage %s: the workers could not save before the resize: %s", self.spec.stage, error)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Lower the number of workers to the nodes that answer, and leave other runs what they claim, unless the run
        would then have too few."""
        try:
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(self.resource)]
        except Exception as error:  # whatever Ray raises while its head is away
            log.warning("stage %s: the nodes could not be counted: %s", self.spec.stage, error)
            return
        there = [node for node in nodes if answers(node)]
        self.silent_nodes = [node["NodeID"] for node in nodes if node not in there]
        available = sum(int(node["Resources"][self.resource]) for node in there)
        with suppress(Exception):  # whatever Ray raises while its head is away
            available -= claimed_by_others(self.resource)
        if self.least <= available < resize_decision.num_workers:
            resize_decision.num_workers = available

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """The nodes where the workers may be."""
        return excluding(self.silent_nodes)
