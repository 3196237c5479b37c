"""A real cluster of several raylets on this machine: nodes come and go, and the weights stay the same bits."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilm.model.export import weights_digest
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.system.files import read_json
from tests.test_driver_curriculum import minilm, run, wait_for, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node without a place for a worker; tests add nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def long_recipe(
    folder: Path, text: Path, teacher: Path, workers: object, steps: int, save_every: float = 2
) -> Path:
    stage = {"batch": 12, "steps": steps, "peak_lr": 1e-3, "warmup_steps": 4, "held_out_rows": 8}
    student = {"layers": 3, "hidden": 48}
    compute = {"micro_batch": 2, "threads": 1, "checkpoint_every_seconds": save_every, "workers": workers}
    return write_recipe(
        folder,
        text,
        teacher,
        stages=[{"name": "assistant", "teacher": str(teacher), "student": student, **stage}],
        compute=compute,
    )


def test_nodes_come_and_go_and_the_weights_are_those_of_one_undisturbed_worker(
    cluster, tmp_path, text, teacher
):
    """1 → 2 → 1 → 3 workers: a node added, a node killed, two nodes added, and a worker killed at last.

    Nothing is saved but before a resize, which repeats no step.
    """
    steps = 2500
    alone = long_recipe(tmp_path, text, teacher, 1, steps)
    run("run", alone, "--workdir", tmp_path / "alone", "--launcher", "inline", seconds=900)
    recipe, work = long_recipe(tmp_path, text, teacher, [1, 3], steps, save_every=3600), tmp_path / "work"
    folder = StageFolder(work / "stages" / "assistant")
    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    process = minilm(
        "run", recipe, "--workdir", work, "--address", cluster.address, MINILM_RESIZE_SECONDS="3"
    )
    began = time.monotonic()
    story = []

    def worker_count() -> int:
        return (read_json(folder.heartbeat) or {}).get("workers", 0)

    def tell(what: str) -> None:
        beat = read_json(folder.heartbeat) or {}
        story.append(f"{time.monotonic() - began:6.1f} s  step {beat.get('step')}  {what}")

    wait_for(lambda: worker_count() == 1 and read_json(folder.heartbeat)["step"] > 20, process)
    tell("one worker; a node is added")
    second = cluster.add_node(num_cpus=1, resources={"trainer": 1})
    wait_for(lambda: worker_count() == 2, process)
    tell("two workers; that node is killed")
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: worker_count() == 1, process)
    tell("one worker; two nodes are added")
    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    wait_for(lambda: worker_count() == 3, process)
    tell("three workers; the first is killed")
    os.kill(read_json(folder.heartbeat)["pid"], signal.SIGKILL)
    out, errors = process.communicate(timeout=600)
    tell("done")
    print("\n".join(story))
    told = re.findall(r"(resumes) at step (\d+)|step (\d+) is (saved)", folder.worker_log(0).read_text())
    walk = [(a or d, int(b or c)) for a, b, c, d in told]
    print(walk)
    resizes = [(step, walk[i + 1]) for i, (what, step) in enumerate(walk) if what == "saved"]
    assert len(resizes) >= 2
    assert all(next_one == ("resumes", step) for step, next_one in resizes), walk
    assert process.returncode == 0, out + errors
    elastic, single = (
        weights_digest(StageFolder(w / "stages" / "assistant").student("assistant"))
        for w in (work, tmp_path / "alone")
    )
    assert elastic == single, "the weights depend on who computed what"
    points = read_all_metrics(folder.step_metrics)
    assert [p.step for p in points] == list(range(4, steps + 1, 4))
    undisturbed = read_all_metrics(StageFolder(tmp_path / "alone" / "stages" / "assistant").step_metrics)
    for a, b in zip(points, undisturbed, strict=True):
        assert a.metrics["assistant/loss"] == pytest.approx(b.metrics["assistant/loss"], rel=1e-5)


def test_a_busy_cpu_elsewhere_does_not_keep_a_run_from_starting(cluster, tmp_path, text, teacher):
    """Ray Train counts total CPUs; a worker asks for its place alone, so an actor that holds every CPU is no matter."""
    import ray

    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> bool:
            return True

    try:
        busy = [Busy.remote() for _ in range(2)]
        assert all(ray.get([actor.ready.remote() for actor in busy], timeout=60))
        recipe = long_recipe(tmp_path, text, teacher, [1, 2], 20)
        run("run", recipe, "--workdir", tmp_path / "work", "--address", cluster.address)
    finally:
        ray.shutdown()


def test_a_killed_driver_run_again_does_not_wait_for_its_own_ghost(cluster, tmp_path, text, teacher):
    """The dead driver's reservation would hold the places for 180 s."""
    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    recipe, work = long_recipe(tmp_path, text, teacher, [1, 2], 600), tmp_path / "work"
    folder = StageFolder(work / "stages" / "assistant")
    process = minilm("run", recipe, "--workdir", work, "--address", cluster.address)
    wait_for(lambda: (read_json(folder.heartbeat) or {}).get("step", 0) > 20, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = time.time()
    process = minilm("run", recipe, "--workdir", work, "--address", cluster.address)
    wait_for(lambda: (read_json(folder.heartbeat) or {}).get("time", 0) > again + 5, process)
    assert time.time() < again + 120
    process.communicate(timeout=300)
    assert process.returncode == 0


@pytest.mark.parametrize("left", ["one stage", "no stage"])
def test_a_reservation_that_a_dead_driver_left_at_another_stage_is_withdrawn_too(
    cluster, tmp_path, text, teacher, left
):
    """Its workers may have finished that stage before they ended: the next run begins behind it, or has only to end."""
    import ray
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    from minilm.orchestrator.launch.reservations import RESERVATION

    cluster.add_node(num_cpus=1, resources={"trainer": 1})
    recipe, work = write_recipe(tmp_path, text, teacher), tmp_path / "work"
    run("run", recipe, "--workdir", work, "--launcher", "inline")
    (work / "summary.json").unlink()
    if left == "one stage":
        for name in ("published.json", "done.json"):
            (work / "stages" / "small" / name).unlink()
    path = work / "stages" / "assistant" / RESERVATION
    path.write_text('{"requester": "train-dead"}')
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        coordinator = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
        request = {"requester_id": "train-dead", "resources": [{"trainer": 1}], "expire_after_s": 180}
        ray.get(coordinator.request_resources.remote(**request))
        assert ray.get(coordinator.get_reserved_resources.remote("train-dead"))
        run("run", recipe, "--workdir", work, "--address", cluster.address)
        assert not ray.get(coordinator.get_reserved_resources.remote("train-dead"))
        assert not path.exists()
    finally:
        ray.shutdown()
