"""What Ray runs of ours, called as Ray does: workers are threads here, and no cluster is started."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.launch import train_callbacks
from minilm.orchestrator.launch.train_callbacks import BELIEF_SECONDS, SILENT_STARTS, StageCallback
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.worker.errors import Evicted
from tests.support import NO_DATA, checkpoints_in, make_spec


class Group:
    """A worker group whose rank 0 is in this process, or whose node is away."""

    def __init__(self, error: Exception | None = None):
        self.error, self.num_asked, self.delayed = error, 0, 0.0


@pytest.fixture(autouse=True)
def fresh_worker(monkeypatch):
    """This process as Ray's fresh worker; what is private to Ray is tested in test_launch_ray_private."""

    def call(group, function, *arguments, seconds):
        group.num_asked += 1
        if group.error:
            raise group.error
        return function(*arguments)

    def delay(group, seconds):
        group.delayed += seconds

    monkeypatch.setattr(train_callbacks, "call_on_rank_zero", call)
    monkeypatch.setattr(train_callbacks, "delay_resize", delay)
    monkeypatch.setattr(train_callbacks, "is_node_drained", lambda: False)
    monkeypatch.setattr(train_callbacks, "is_resizing", lambda state: state == "resizing")
    monkeypatch.setattr(train_callbacks, "log_to_file", lambda spec: None)
    for name in ("asked_to_leave", "has_left"):
        monkeypatch.setattr(train_callbacks, name, threading.Event())


def new_callback(spec, least=1):
    return StageCallback(spec, "trainer", least)


def running(spec, group):
    """The controller's callback while `group` runs."""
    callback = new_callback(spec)
    callback.before_worker_group_start(None)
    callback.after_worker_group_start(group)
    return callback


def resize(callback) -> None:
    callback.after_controller_state_update("running", "resizing")


def test_before_a_resize_the_step_that_is_computed_is_saved(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, steps=100_000, checkpoint_every_steps=None)
    folder = StageFolder(tmp_path)
    callback = running(spec, Group())
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(train_callbacks.train_function, {"spec": spec.to_json()})
        deadline = time.monotonic() + 60
        while not folder.heartbeat.exists() or read_json(folder.heartbeat)["step"] < 1:
            assert time.monotonic() < deadline and not worker.done()
            time.sleep(0.01)
        resize(callback)
        (saved,) = checkpoints_in(folder.checkpoints)  # and whole, before Ray goes on
        with pytest.raises(Evicted, match=f"step {int(saved.name[-9:])} is saved"):
            worker.result(10)
    assert read_json(tmp_path / "attempts.json")["running"] is False  # it counts as no death


def test_a_worker_that_has_ended_is_not_waited_for(tmp_path, monkeypatch):
    spec = make_spec(NO_DATA, tmp_path, tmp_path, stall_seconds=60)
    monkeypatch.setattr(train_callbacks, "run_reporting", lambda spec, eviction_announced: True)
    train_callbacks.train_function({"spec": spec.to_json()})
    began = time.monotonic()
    resize(running(spec, Group()))
    assert time.monotonic() - began < 5


def test_workers_that_do_not_answer_are_replaced_all_the_same(tmp_path):
    resize(running(make_spec(NO_DATA, tmp_path, tmp_path, stall_seconds=0.02), Group()))
    assert train_callbacks.asked_to_leave.is_set()
    group = Group(ConnectionError("the node is away"))
    resize(running(make_spec(NO_DATA, tmp_path, tmp_path), group))
    assert group.num_asked == 1


def test_only_healthy_workers_are_asked(tmp_path):
    group = Group()
    callback = running(make_spec(NO_DATA, tmp_path, tmp_path, stall_seconds=0.02), group)
    callback.after_controller_state_update("running", "restarting")
    assert group.num_asked == 0


def test_starts_without_a_sign_of_life_end_the_run_with_what_the_workers_said(tmp_path):
    callback = new_callback(make_spec(NO_DATA, tmp_path, tmp_path))

    def start() -> None:
        callback.before_worker_group_start(None)
        callback.after_worker_group_start(Group())
        callback.after_worker_group_poll_status(
            SimpleNamespace(errors={1: OSError("Read-only\nfile system")})
        )

    for _ in range(SILENT_STARTS - 1):
        start()
    write_json(StageFolder(tmp_path).heartbeat, {"step": 1})  # the count begins again
    for _ in range(SILENT_STARTS):
        start()
    for _ in range(3):  # a wait for resources is no start
        with pytest.raises(
            InfrastructureError, match="died 5 times .* because of Read-only file system; the"
        ):
            callback.before_worker_group_start(None)


@pytest.fixture
def nodes(monkeypatch):
    """A node that answers, one whose raylet has died, one that Ray knows to be dead, and one without a place."""
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody listens at it
        gone = other.getsockname()
        nodes = [
            {"NodeID": name, "Alive": alive, "Resources": resources}
            | {"NodeManagerAddress": port[0], "NodeManagerPort": port[1]}
            for name, alive, resources, port in (
                ("answers", True, {"trainer": 2.0}, raylet.getsockname()),
                ("silent", True, {"trainer": 1.0}, gone),
                ("dead", False, {}, gone),
                ("head", True, {"CPU": 1.0}, gone),
            )
        ]
        monkeypatch.setattr(train_callbacks.ray, "nodes", lambda: nodes)
        yield nodes


@pytest.mark.parametrize(("least", "decided", "started"), [(1, 3, 2), (1, 1, 1), (3, 3, 3)])
def test_a_node_that_does_not_answer_is_not_counted_before_ray_knows(
    tmp_path, nodes, least, decided, started
):
    callback = new_callback(make_spec(NO_DATA, tmp_path, tmp_path), least)
    decision = SimpleNamespace(num_workers=decided)
    callback.before_controller_execute_resize_decision(decision)
    assert decision.num_workers == started
    selector = callback.on_controller_start_worker_group(scaling_config=None, num_workers=started)
    assert selector == {"ray.io/node-id": "!in(silent)"}
    group = Group()
    callback.after_worker_group_start(group)
    assert group.delayed == BELIEF_SECONDS  # no resize before Ray knows, too
    nodes.pop(1)  # Ray knows now
    callback.before_controller_execute_resize_decision(decision)
    assert callback.on_controller_start_worker_group(scaling_config=None, num_workers=started) is None


@pytest.mark.parametrize(("claimed", "started"), [(0, 2), (1, 1), (2, 2)])
def test_what_other_runs_claim_is_left_to_them(tmp_path, nodes, monkeypatch, claimed, started):
    """Their places may be free, between two of their stages. With too few left the decision is Ray's."""
    monkeypatch.setattr(train_callbacks, "claimed_by_others", lambda resource: claimed)
    decision = SimpleNamespace(num_workers=2)
    new_callback(make_spec(NO_DATA, tmp_path, tmp_path), 1).before_controller_execute_resize_decision(
        decision
    )
    assert decision.num_workers == started


def test_a_head_that_is_away_leaves_the_decision_to_ray(tmp_path, monkeypatch):
    def away():
        raise ConnectionError("no GCS")

    monkeypatch.setattr(train_callbacks.ray, "nodes", away)
    decision = SimpleNamespace(num_workers=3)
    new_callback(make_spec(NO_DATA, tmp_path, tmp_path)).before_controller_execute_resize_decision(decision)
    assert decision.num_workers == 3
