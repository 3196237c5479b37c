"""The machine with Ray's head is lost in mid-run, alone or with all the others: the same command goes on elsewhere."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minilm.model.export import weights_digest
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json
from tests.test_driver_curriculum import minilm, run, wait_for, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

END_SECONDS = 120  # for the driver to notice and to end


@pytest.fixture
def start_cluster() -> Iterator[Callable[[], Any]]:
    """Clusters of a head without a place for a worker and a node with one."""
    from ray.cluster_utils import Cluster

    clusters = []

    def start() -> Any:
        clusters.append(Cluster(initialize_head=True, head_node_args={"num_cpus": 1}))
        clusters[-1].add_node(num_cpus=1, resources={"trainer": 1})
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    stage = {"batch": 48, "steps": 500, "peak_lr": 1e-3, "warmup_steps": 4, "held_out_rows": 8}
    first = {"name": "assistant", "teacher": str(teacher), "student": {"layers": 3, "hidden": 48}, **stage}
    compute = {"micro_batch": 4, "threads": 1, "checkpoint_every_seconds": 1}
    return write_recipe(tmp_path_factory.mktemp("recipe"), text, teacher, stages=[first], compute=compute)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> str:
    """The weights of a run that nobody disturbed."""
    run("run", recipe, "--workdir", recipe.parent / "alone", "--launcher", "inline")
    return weights(recipe.parent / "alone")


def weights(work: Path) -> str:
    return weights_digest(StageFolder(work / "stages" / "assistant").student("assistant"))


def kill(node: Any) -> None:
    """SIGKILL for all of Ray's processes of a node; its workers end by themselves, without their raylet."""
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


class Run:
    """`minilm run` on a cluster, in mid-run, with a checkpoint made."""

    def __init__(self, recipe: Path, work: Path, cluster: Any):
        self.folder = StageFolder(work / "stages" / "assistant")
        self.process = minilm("run", recipe, "--workdir", work, "--address", cluster.address)
        wait_for(self.trains, self.process)

    def trains(self) -> bool:
        return self.beat.get("step", 0) > 40 and any(self.folder.checkpoints.glob("step-*"))

    @property
    def beat(self) -> dict[str, Any]:
        return read_json(self.folder.heartbeat) or {}


def go_on(recipe: Path, work: Path, cluster: Any) -> None:
    run("run", recipe, "--workdir", work, "--address", cluster.address)
    assert "resumes at step" in StageFolder(work / "stages" / "assistant").worker_log(0).read_text()


def test_a_lost_head_ends_the_driver_with_a_line_and_the_same_command_goes_on_at_another(
    start_cluster, recipe, undisturbed, tmp_path
):
    """The worker's node is left, and its worker trains on without a head."""
    cluster = start_cluster()
    lost = Run(recipe, tmp_path / "work", cluster)
    kill(cluster.head_node)
    began = time.monotonic()
    try:
        _, errors = lost.process.communicate(timeout=END_SECONDS)
    finally:
        lost.process.kill()
    print(f"the driver ended {time.monotonic() - began:.0f} s after its head, at step {lost.beat['step']}")
    assert lost.process.returncode == 10, errors
    (line,) = (line for line in errors.splitlines() if line.startswith("minilm: error:"))
    print(line)
    assert "the same command goes on" in line
    assert "Traceback" not in errors
    assert not lost.folder.done.exists()
    go_on(recipe, tmp_path / "work", start_cluster())
    assert weights(tmp_path / "work") == undisturbed


def test_driver_head_and_workers_killed_at_once_change_nothing(start_cluster, recipe, undisturbed, tmp_path):
    cluster = start_cluster()
    lost = Run(recipe, tmp_path / "work", cluster)
    for pid in (lost.process.pid, lost.beat["pid"]):
        os.kill(pid, signal.SIGKILL)
    for node in (cluster.head_node, *cluster.worker_nodes):
        kill(node)
    lost.process.communicate()
    assert not lost.folder.done.exists()
    go_on(recipe, tmp_path / "work", start_cluster())
    assert weights(tmp_path / "work") == undisturbed
