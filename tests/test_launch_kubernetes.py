"""The sample manifest: fields that KubeRay has, and values that this project's behaviour depends on.

No cluster is at hand: the field names are those of KubeRay 1.7's types, as far as the manifest may want them.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from minilm.orchestrator.cli import parser

ROOT = Path(__file__).parent.parent
FILE = ROOT / "orchestrator" / "launch" / "kubernetes" / "rayjob.yaml"
JOB = """entrypoint runtimeEnvYAML jobId metadata submissionMode submitterConfig backoffLimit activeDeadlineSeconds
preRunningDeadlineSeconds shutdownAfterJobFinishes ttlSecondsAfterFinished deletionStrategy suspend clusterSelector
rayClusterSpec""".split()  # noqa: SIM905
CLUSTER = [
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
]  # noqa: SIM905
HEAD = {"rayStartParams", "template"}
GROUP = HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}


@pytest.fixture
def job():
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def test_every_field_is_one_that_kuberay_has(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= set(JOB)
    assert set(cluster) <= set(CLUSTER)
    assert set(cluster["headGroupSpec"]) <= HEAD
    assert all(set(group) <= GROUP for group in cluster["workerGroupSpecs"])
    assert "clusterSelector" not in spec, "it excludes backoffLimit"
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    for params in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in params["rayStartParams"].values())


def test_the_entrypoint_is_a_command_of_ours_with_a_lasting_work_directory(job):
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "minilm"
    options = parser().parse_args(arguments)
    mounts = {
        mount["mountPath"]
        for group in (job["spec"]["rayClusterSpec"]["headGroupSpec"], *workers(job))
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
    }
    assert any(str(options.workdir).startswith(f"{mount}/") for mount in mounts)


def test_workers_offer_the_exclusive_place_and_the_head_none(job):
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in workers(job):
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"trainer": 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_pod_has_time_for_a_checkpoint_and_shares_storage(job):
    stop = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert stop["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    for group in (job["spec"]["rayClusterSpec"]["headGroupSpec"], *workers(job)):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > int(stop["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes["runs"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_ray_is_the_version_that_is_installed(job):
    pinned = re.search(r'"ray\[.*\]==([\d.]+)\.\*"', (ROOT / "pyproject.toml").read_text())
    assert pinned and job["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{pinned[1]}.")


def test_the_image_can_reach_object_storage():
    assert "pip install --no-cache-dir '.[remote]'" in (ROOT / "Dockerfile").read_text()


def workers(job):
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
