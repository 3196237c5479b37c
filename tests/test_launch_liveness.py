"""The driver's judgement of silent workers, on a clock of the test's own; real stops are in test_elastic."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from minilm.orchestrator.errors import InfrastructureError, Stopped
from minilm.orchestrator.launch import liveness
from minilm.orchestrator.launch.liveness import Heartbeats, Supervisor
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.system.processes import Process, started
from minilm.orchestrator.worker.metric_logger import MetricLogger
from tests.support import NO_DATA, make_spec


class Scene:
    """A stage with stall_seconds 100 and wait_seconds 50 under supervision."""

    def __init__(self, folder: Path):
        self.folder, self.now, self.missing = folder, 0.0, ""
        self.ended: list[int] = []
        self.said: list[str] = []
        spec = make_spec(NO_DATA, folder, folder, attempt="mine", stall_seconds=100.0)
        self.beats = Heartbeats(spec, clock=lambda: self.now)
        self.supervisor = Supervisor(
            spec,
            self.beats,
            wait_seconds=50,
            kill=self.kill,
            lacking=lambda: self.missing,
            say=self.said.append,
        )

    def kill(self, process: Process) -> bool:
        self.ended.append(process.pid)
        return True

    def beat(self, step: int, doing: str = "training", attempt: str = "mine") -> None:
        process = asdict(Process("there", "machine", 7, 1))
        write_json(
            StageFolder(self.folder).heartbeat,
            {"attempt": attempt, "doing": doing, "step": step, "process": process},
        )

    def after(self, seconds: float, *, stop: bool = False) -> str:
        shown = ""
        for _ in range(int(seconds)):
            self.now += 1
            self.beats.poll()
            shown = self.supervisor(stop)
        return shown


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Scene:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.0)
    return Scene(tmp_path)


def test_a_worker_without_a_step_is_ended_once_and_its_heir_has_time_to_start(scene):
    scene.beat(5)
    assert scene.after(1) == ""
    assert scene.after(105) == "last heartbeat 105 s ago"
    assert scene.ended == []  # its own watchdog comes first
    scene.after(900)
    assert scene.ended == [7]
    assert scene.said == [
        "stage first: process 7 on there has made no step for 111 s and was killed; another one goes on from the "
        "last checkpoint"
    ]
    scene.beat(3)
    assert scene.after(1) == ""
    with pytest.raises(
        InfrastructureError, match="no worker has given a sign of life for .* the same command"
    ):
        scene.after(1200)
    assert scene.ended == [7, 7]


@pytest.mark.parametrize("doing", ["evaluating", "saving", "exporting", None])
def test_what_may_take_long_has_ten_times_the_time(scene, doing):
    if doing:
        scene.beat(5, doing)
    scene.after(1000)
    assert scene.ended == []
    if doing:
        scene.after(20)
        assert scene.ended == [7]
    else:
        with pytest.raises(
            InfrastructureError, match="no worker has given a sign of life for 1011 s; look at worker"
        ):
            scene.after(20)


def test_the_heartbeat_says_at_once_that_something_else_is_done(tmp_path, monkeypatch):
    """A worker that is stopped in the second after an evaluation must not have ten times as long."""
    monkeypatch.setattr("minilm.orchestrator.worker.metric_logger.HEARTBEAT_SECONDS", 3600.0)
    metric_logger = MetricLogger(
        make_spec(NO_DATA, tmp_path, tmp_path), writes=True, workers=1, seq_len=8, fence=Fence("")
    )

    def told(doing: str, step: int) -> tuple[str, int]:
        metric_logger.beat(doing, step)
        beat = read_json(StageFolder(tmp_path).heartbeat)
        assert beat is not None
        return beat["doing"], beat["step"]

    assert [told("evaluating", 5), told("training", 6)] == [("evaluating", 5), ("training", 6)]
    assert told("training", 7) == ("training", 6), "steps are told by the clock"
    metric_logger.close()


def test_steps_are_slow_when_two_points_running_take_a_multiple_of_the_usual(tmp_path):
    metric_logger = MetricLogger(
        make_spec(NO_DATA, tmp_path, tmp_path), writes=True, workers=1, seq_len=8, fence=Fence("")
    )
    for seconds in (9.0, 1.0, 1.1, 0.9, 4.0, 1.0, 3.0):  # the first step warms up; one point may be a save's
        metric_logger.notice_slowness(seconds)
    assert metric_logger.slowness is None
    metric_logger.notice_slowness(2.5)
    metric_logger.notice_slowness(8.0)
    metric_logger.beat("training", 9)
    told = read_json(StageFolder(tmp_path).heartbeat)["slowness"]
    assert told["times"] == pytest.approx(2.5) and told["load"] >= 0 and told["processors"] >= 1
    metric_logger.close()


def test_a_heartbeat_of_an_older_attempt_or_half_a_file_is_none(scene, tmp_path):
    scene.beat(5, attempt="older")
    scene.after(1)
    StageFolder(tmp_path).heartbeat.write_text("{")
    scene.after(1)
    assert scene.beats.newest is None
    assert scene.beats.silent == 2


def test_a_cluster_that_has_lost_its_places_is_waited_for_as_configured(scene):
    scene.beat(5)
    scene.after(5)
    scene.missing = "the Ray cluster has 1 trainer"
    assert scene.after(30) == "waiting for the cluster: the Ray cluster has 1 trainer (19 of 50 s)"
    scene.missing = ""
    assert scene.after(5) == "last heartbeat 39 s ago"  # the first second saw it
    scene.missing = "the Ray cluster has 0 trainer"
    with pytest.raises(
        InfrastructureError, match="has 0 trainer; compute.wait_seconds is 50; add nodes or lower"
    ):
        scene.after(60)
    assert scene.ended == []


def test_a_head_that_does_not_answer_may_come_back(scene):
    def lacking():
        raise InfrastructureError("the Ray cluster does not answer")

    scene.beat(5)
    scene.supervisor.lacking = lacking
    assert "does not answer (19 of 50 s)" in scene.after(35)
    with pytest.raises(
        InfrastructureError, match="does not answer; compute.wait_seconds is 50; add nodes or"
    ):
        scene.after(60)


def test_a_stop_is_not_waited_for_where_nobody_can_hear_it(scene):
    with pytest.raises(Stopped, match="while it waited for workers; the same command goes on"):
        scene.after(1, stop=True)
    scene.beat(5)
    assert scene.after(40, stop=True)  # a long step: the worker stops at its end
    scene.missing = "the Ray cluster has 1 trainer"
    with pytest.raises(Stopped):
        scene.after(2, stop=True)


def test_a_process_is_killed_even_when_it_is_stopped_and_never_another_with_its_number():
    child = subprocess.Popen(
        [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    )
    here = Process.this()
    process = Process(here.host, here.machine, child.pid, started(child.pid) or 0)
    assert not Process(here.host, here.machine, child.pid, 1).kill()
    assert not Process(here.host, "another", child.pid, process.started).kill()
    assert process.is_here and not process.is_gone()
    assert process.kill()
    assert child.wait(10) == -9
    assert process.is_gone() and not process.kill()
