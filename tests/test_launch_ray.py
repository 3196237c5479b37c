"""The same curricula under a real Ray: a job submitted to a head node, workers and driver killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from minilm.orchestrator.launch.ray_launcher import worker_environment
from minilm.orchestrator.launch.reservations import RESERVATION
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.processes import Process, family
from tests.ports import free_port
from tests.support import crowded_folder, has_checkpoint
from tests.test_driver_curriculum import digests, finished, minilm, run, wait_for, write_recipe  # noqa: F401 (a fixture)

# the first one also starts the head and makes the run that is left alone
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`ray start --head`, as an operator types it, with a home of its own; the environment that reaches it."""
    dashboard = free_port()
    environment = {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--port",
        environment.setdefault("PORT", str(free_port())),
        "--dashboard-port",
        str(dashboard),
        "--dashboard-agent-listen-port",  # else a second cluster on the machine has no agent for jobs
        str(free_port()),
    ]
    command += [
        "--resources",
        '{"trainer": 2}',
        "--num-cpus",
        "2",
        "--temp-dir",
        f"/tmp/minilm-ray-{os.getpid()}",
    ]
    process = subprocess.Popen(
        [BIN / command[0], *command[1:]],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None, "the Ray head has died"
        assert time.monotonic() < deadline, "the Ray head does not come up"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=1)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    try:
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


JOIN = """
import ray, sys
from pathlib import Path
from minilm.orchestrator.launch.cluster import Cluster
from minilm.orchestrator.system.signals import StopRequest
Cluster(sys.argv[1], 1, Path("record")).connect(StopRequest())
class Controller:
    def run(self):
        return "runs"
print(ray.get(ray.remote(Controller).options(num_cpus=0).remote().run.remote(), timeout=60))
"""


def test_a_token_in_the_home_folder_keeps_nobody_off_a_cluster_without_tokens(head, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ab" * 32)
    environment = {key: value for key, value in (os.environ | head).items() if key != "RAY_AUTH_MODE"}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", JOIN, f"127.0.0.1:{head['PORT']}"],
        env=environment | {"HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == "runs\n", ended.stderr


def command_lines(root: int) -> str:
    """Of process `root`, its children, theirs and so on."""
    lines = ""
    for pid in family(root):
        with suppress(OSError):  # it has just ended
            lines += Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return lines


def submit(head: dict[str, str], folder: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- ENTRYPOINT`, typed in `folder`."""
    command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *entrypoint]
    for _ in range(20):
        done = subprocess.run(
            command,
            env=os.environ | head,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if "No available agent to submit job" not in done.stdout + done.stderr:
            break
        time.sleep(3)  # the head answers before its job agent does
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_checkout_as_working_directory_brings_the_package_along(head):
    """Its links arrive as folders, so that a cluster without the package runs what was submitted."""
    code = (
        "import minilm.orchestrator.cli, minilm.data.stream, minilm.model.distiller as m; print(m.__file__)"
    )
    done = submit(head, ROOT, "python", "-c", code)
    assert re.search(r"working_dir_files/\S+/minilm/model/distiller.py", done.stdout), done.stdout


def test_a_recipe_submitted_as_a_ray_job_takes_both_places(head, finished, tmp_path, text, teacher):  # noqa: F811
    """`ray job submit --working-dir . -- minilm run RECIPE`; the losses are the one-worker run's."""
    compute = {"micro_batch": 4, "threads": 1, "workers": "auto", "checkpoint_every_steps": 4}
    folder = crowded_folder(tmp_path / "user")
    write_recipe(folder, text, teacher, compute=compute)
    done = submit(head, folder, "minilm", "run", "tiny.yaml")
    assert re.search(r"Job 'raysubmit_\w+' succeeded", done.stdout)
    assert "tiny-small v1" in done.stdout
    assert "`ray job stop` will kill this run after 3 s, saved or not; to let it save" in done.stdout
    work = Path(head["HOME"]) / "minilm-runs" / "tiny"
    assert (work / "stages" / "assistant" / "worker-1.log").exists(), "the second worker left no trace"
    for stage in ("assistant", "small"):
        ours, theirs = (
            read_all_metrics(StageFolder(folder / "stages" / stage).step_metrics)
            for folder in (work, finished / "work")
        )
        assert [p.step for p in ours] == [p.step for p in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.metrics[f"{stage}/loss"] == pytest.approx(b.metrics[f"{stage}/loss"], rel=1e-3)


def test_a_job_that_no_retry_cures_is_stopped_and_says_why(head, tmp_path):
    """KubeRay retries failed jobs, each time with a new cluster, but no stopped ones."""
    entrypoint = ("python", "-m", "minilm.orchestrator.launch.job_entrypoint")
    done = submit(head, crowded_folder(tmp_path / "user"), *entrypoint, "run", "none.yaml")
    assert re.search(r"Job 'raysubmit_\w+' was stopped", done.stdout + done.stderr)
    told = "minilm: no retry cures exit code 2, so this job is stopped for good: minilm: error: "
    assert told in done.stdout


@pytest.mark.slow
def test_killed_workers_and_a_killed_driver_change_nothing(finished, tmp_path):  # noqa: F811
    """A local cluster of `minilm run` itself: SIGKILL the worker in the first stage, both in the second."""
    recipe, work = finished / "tiny.yaml", tmp_path / "work"
    first, second = (StageFolder(work / "stages" / name) for name in ("assistant", "small"))
    process = minilm("run", recipe, "--workdir", work, cwd=finished / "user")
    wait_for(lambda: has_checkpoint(first.checkpoints, 8), process)
    beat = read_json(first.heartbeat)
    assert beat["pid"] != process.pid
    os.kill(beat["pid"], signal.SIGKILL)
    wait_for(lambda: has_checkpoint(second.checkpoints, 8), process)
    worker = read_json(second.heartbeat)["pid"]
    os.kill(worker, signal.SIGSTOP)  # else it would make its few steps meanwhile
    titles = command_lines(process.pid)
    assert "gcs_server" in titles and "ray::TrainController" in titles
    assert "Preemption" not in titles, "a run of one node of its own is not told of other nodes' end"
    environment = Path(f"/proc/{worker}/environ").read_text().split("\0")
    assert {f"{name}={value}" for name, value in worker_environment().items()} <= set(environment)
    niceness = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (worker, process.pid)]
    assert niceness[0] == niceness[1], "by itself Ray gives its workers 15 more"
    os.kill(worker, signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not second.done.exists()
    assert not (second.root / RESERVATION).exists(), "nothing to withdraw: the run's own cluster ends with it"
    assert (first.root / "worker-0.log").read_text().count("resumes at step") == 1
    _, errors = run("run", recipe, "--workdir", work, "--address", "127.0.0.1:1", expect=2)
    assert errors.splitlines()[0] == "starting Ray", "at once: the inputs are known"
    assert errors.splitlines()[1].startswith("minilm: error: no Ray cluster answers at 127.0.0.1:1")
    left = [Process(**fields) for fields in read_json(work / "cluster.json")]
    process = minilm("run", recipe, "--workdir", work)
    assert process.stderr.readline() == "starting Ray\n"
    wait_for(lambda: "gcs_server" in command_lines(process.pid), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 3, errors
    assert re.search("minilm: stopped: stopped (while Ray started|before the stage began); the same", errors)
    run("run", recipe, "--workdir", work)
    assert all(process.is_gone() for process in left)
    assert digests(work) == digests(finished / "work")


def test_a_cluster_without_room_is_refused_with_what_it_has(head, finished, tmp_path):  # noqa: F811
    override = (
        "--set",
        "compute.workers=3",
        "--set",
        "stages.assistant.batch=12",
        "--set",
        "stages.small.batch=12",
    )
    arguments = (
        finished / "tiny.yaml",
        "--workdir",
        tmp_path / "work",
        "--address",
        f"127.0.0.1:{head['PORT']}",
        *override,
    )
    _, errors = run("run", *arguments, "--set", "compute.wait_seconds=2", expect=2, **head)
    lack = "the Ray cluster has 2 trainer, the recipe asks for 3, one for each worker"
    assert re.search(rf"waiting for the cluster: {lack} \(\ds of 2s\)", errors)
    assert f"minilm: error: {lack}; lower compute.workers or add nodes" in errors
    assert "Traceback" not in errors


def test_a_gpu_where_there_is_none_is_refused_before_a_cluster_is_started(finished, tmp_path):  # noqa: F811
    work = ("--workdir", tmp_path / "work", "--set", "compute.device=cuda")
    _, errors = run("run", finished / "tiny.yaml", *work, expect=2, CUDA_VISIBLE_DEVICES="")
    assert (
        "minilm: error: compute.device is cuda, but this machine has no usable CUDA device; use --set"
        in errors
    )
    assert "starting Ray" not in errors
    assert "Traceback" not in errors
