"""Workers that stand still, are told to leave, can't write or have no place: on a real cluster of several raylets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json
from tests.test_driver_curriculum import minilm, wait_for, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = Path(sys.executable).parent / "ray"


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node without a place for a worker; tests add nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


class Run:
    """`minilm run` of an endless stage on the cluster."""

    def __init__(self, cluster: Any, folder: Path, text: Path, teacher: Path, **compute: object):
        stage = {"batch": 12, "steps": 1_000_000, "peak_lr": 1e-3, "warmup_steps": 4, "held_out_rows": 8}
        first = {
            "name": "assistant",
            "teacher": str(teacher),
            "student": {"layers": 3, "hidden": 48},
            **stage,
        }
        given = {"micro_batch": 2, "threads": 1, "checkpoint_every_seconds": 1, **compute}
        recipe = write_recipe(folder, text, teacher, stages=[first], compute=given)
        self.folder = StageFolder(folder / "work" / "stages" / "assistant")
        self.errors = folder / "errors"
        self.process = minilm("run", recipe, "--workdir", folder / "work", "--address", cluster.address)

    def beat(self) -> dict[str, Any]:
        return read_json(self.folder.heartbeat) or {"pid": 0, "step": -1, "workers": 0, "doing": ""}

    def log(self, rank: int = 0) -> str:
        return self.folder.worker_log(rank).read_text()

    def until(self, condition: Callable[[], object]) -> float:
        began = time.monotonic()
        wait_for(condition, self.process)
        return time.monotonic() - began

    def until_trains(self, but: int = 0) -> float:
        """A step by another process than `but`."""
        return self.until(lambda: self.beat()["pid"] not in (0, but) and self.beat()["doing"] == "training")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        out, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 3, out + errors
        return errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_worker_is_replaced(cluster, tmp_path, text, teacher, rank):
    """SIGSTOP stops its watchdog too. Alone, only the driver can see it; of two, the other one hangs with it."""
    for _ in range(rank + 1):
        cluster.add_node(num_cpus=1, resources={"trainer": 1})
    run = Run(cluster, tmp_path, text, teacher, workers=rank + 1, stall_seconds=4)
    run.until_trains()
    time.sleep(3)
    before, step = run.beat()["pid"], run.beat()["step"]
    pid = int(re.findall(rf"rank {rank} is process (\d+) on", run.log(rank))[-1])
    os.kill(pid, signal.SIGSTOP)
    seconds = run.until_trains(but=before)
    print(f"rank {rank} stopped at step {step}: the next step {seconds:.0f} s later, at {run.beat()['step']}")
    errors = run.stop()
    assert not Path(f"/proc/{pid}").exists(), "the stopped worker is still there"
    if rank == 0:
        assert re.search(rf"process {pid} on .* has made no step for \d+ s and was killed; another", errors)
    else:
        assert "Timeout (0:00:04)!" in run.log(0)  # with the stack that waits for its peer
        assert "all_reduce" in run.log(0)


def test_a_drained_node_is_left_without_a_step_repeated(cluster, tmp_path, text, teacher):
    first = cluster.add_node(num_cpus=1, resources={"trainer": 1})
    run = Run(cluster, tmp_path, text, teacher, checkpoint_every_seconds=3600)
    run.until_trains()
    before = run.beat()["pid"]
    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    target = ("--address", cluster.address, "--node-id", first.node_id, "--deadline-remaining-seconds", "300")
    subprocess.run([RAY, "drain-node", *target, *reason], check=True, capture_output=True)
    seconds = run.until_trains(but=before)
    saved = re.findall(r"step (\d+) is saved, because these workers are about to be replaced", run.log())
    resumed = re.findall(r"resumes at step (\d+)", run.log())
    print(f"drained: the next step {seconds:.0f} s later, from step {resumed}")
    assert saved[0] == resumed[0]
    assert len(resumed) <= 2, "it went back to the node again and again"
    run.stop()


def test_a_node_that_cannot_write_the_folder_ends_the_run_with_its_words(cluster, tmp_path, text, teacher):
    """The work directory is mounted read-only where the worker runs, and nowhere else: no failure can be left there."""
    stage = tmp_path / "work" / "stages" / "assistant"
    stage.mkdir(parents=True)
    mount = f"mount --bind {stage} {stage} && mount -o remount,ro,bind {stage} && exec "
    places = """--resources '{"trainer": 1}' --num-cpus 1 --block"""
    script = f"{mount} {RAY} start --address {cluster.address} {places}"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        time.sleep(1)
        if node.poll() is not None:
            pytest.skip("mounting needs root")
        run = Run(cluster, tmp_path, text, teacher)
        _, errors = run.process.communicate(timeout=600)
        assert run.process.returncode == 10, errors
        (line,) = (line for line in errors.splitlines() if line.startswith("minilm: error:"))
        assert "its workers died 5 times in a row without a sign of life, at last because of" in line
        assert "Read-only file system" in line
        assert "Traceback" not in errors
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def test_a_run_that_has_lost_its_places_says_so_and_can_be_stopped(cluster, tmp_path, text, teacher):
    nodes = [cluster.add_node(num_cpus=1, resources={"trainer": 1}) for _ in range(2)]
    run = Run(cluster, tmp_path, text, teacher, workers=2, stall_seconds=10)
    run.until_trains()
    cluster.remove_node(nodes[1], allow_graceful=False)
    time.sleep(45)
    assert run.process.poll() is None
    errors = run.stop()
    assert "the Ray cluster has 1 trainer, the recipe asks for 2, one for each worker" in errors
    assert "stopped while it waited for workers; the same command goes on" in errors
