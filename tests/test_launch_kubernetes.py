"""The sample manifests: fields that KubeRay's CRD has, and values that this project's behaviour depends on.

No cluster is at hand. `kuberay_fields.json` holds every field's name and type of a RayJob, made from the CRD of KubeRay
1.7.0, the pods' included; the API server refuses others in strict mode, and drops them otherwise.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minilm.orchestrator.cli import parser

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "orchestrator" / "launch" / "kubernetes"
FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text(encoding="utf-8"))
TYPES = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "quantity": (int, str)}


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def storage() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((FOLDER / "storage.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def unknown(value: Any, kind: Any, place: str) -> Iterator[str]:
    """What of `value` is no field, or not of its type."""
    if isinstance(kind, str) and kind in FIELDS:
        kind = FIELDS[kind]
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            yield f"{place} is no object"
            return
        for name, inner in value.items():
            if name not in kind and "*" not in kind:
                yield f"{place} has no field {name}"
            else:
                yield from unknown(inner, kind.get(name, kind.get("*")), f"{place}.{name}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for number, inner in enumerate(value):
            yield from unknown(inner, kind[0], f"{place}[{number}]")
    elif kind == "any":
        return
    elif kind in TYPES:
        if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            yield f"{place} is no {kind}"
    elif value not in kind.split("|"):
        yield f"{place} is none of {kind}"


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [group["template"]["spec"] for group in groups]


def workers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def test_every_field_is_one_that_kuberay_has(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert not list(unknown(job["spec"], "RayJobSpec", "spec"))
    assert "clusterSelector" not in job["spec"], "it excludes backoffLimit"


def test_fields_that_kuberay_has_not_are_found(job):
    """So that the test above can fail."""
    spec = job["spec"]
    spec["backofLimit"] = 3
    spec["rayClusterSpec"]["authOptions"] = {"mode": "tokens"}
    container = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    container["securityContext"] = container["securityContext"] | {"runAsNonRoot": "yes"}
    pods(job)[1]["tolerations"] = {}
    head = "spec.rayClusterSpec.headGroupSpec.template.spec.containers[0]"
    assert set(unknown(spec, "RayJobSpec", "spec")) == {
        "spec has no field backofLimit",
        "spec.rayClusterSpec.authOptions.mode is none of disabled|token",
        f"{head} has no field resource",
        f"{head}.securityContext.runAsNonRoot is no boolean",
        "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.tolerations is no list",
    }


def test_the_entrypoint_is_a_command_of_ours_with_a_lasting_work_directory(job):
    """In one word after the other: a shell of the submitting pod reads it unquoted."""
    python, flag, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "minilm.orchestrator.launch.job_entrypoint")
    assert re.fullmatch(r"[\w./ -]+", job["spec"]["entrypoint"])
    options = parser().parse_args(arguments)
    for pod in pods(job):
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volume = next(name for path, name in mounts.items() if str(options.workdir).startswith(f"{path}/"))
        assert "persistentVolumeClaim" in {v["name"]: v for v in pod["volumes"]}[volume]


def test_workers_offer_the_exclusive_place_and_the_head_none(job):
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in workers(job):
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"trainer": 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_pod_has_time_for_a_checkpoint_and_shares_storage(job):
    """The drain time is the node's, from Ray's SIGTERM on: by itself 30 s, whatever the pod's grace is."""
    stop = int(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for pod in pods(job):
        (container,) = pod["containers"]
        drain = {item["name"]: item["value"] for item in container["env"]}
        assert int(drain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) >= pod["terminationGracePeriodSeconds"]
        assert pod["terminationGracePeriodSeconds"] > stop >= 60
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_every_container_may_do_little(job):
    """As a namespace with the restricted policy demands, and no writable root; Ray's own folder is below /tmp."""
    options = job["spec"]["rayClusterSpec"]["autoscalerOptions"]
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    for pod in (submitter, *pods(job)):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == context["fsGroup"] == image_user()
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (options, *(c for pod in (submitter, *pods(job)) for c in pod["containers"])):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
        assert "ephemeral-storage" in container["resources"]["requests"]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert all(group["template"]["spec"]["automountServiceAccountToken"] is False for group in workers(job))


def test_the_head_stays_and_workers_may_be_spot_machines_with_gpus(job, storage):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert head["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    budget = storage["PodDisruptionBudget"]["spec"]
    assert budget["maxUnavailable"] == 0
    assert budget["selector"]["matchLabels"].items() <= head["metadata"]["labels"].items()
    assert not head["spec"].get("tolerations")
    for group in workers(job):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert "nvidia.com/gpu.present" in pod["nodeSelector"]
        keys = {toleration["key"] for toleration in pod["tolerations"]}
        assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= keys


def test_what_the_job_names_is_there(job, storage):
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for pod in pods(job)
        for v in pod["volumes"]
        if "runs" in v["name"]
    }
    assert claims == {storage["PersistentVolumeClaim"]["metadata"]["name"]}
    assert storage["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    accounts = {pod["serviceAccountName"] for pod in pods(job)}
    assert accounts == {storage["ServiceAccount"]["metadata"]["name"]}


def test_ray_is_the_version_that_is_installed(job):
    pinned = re.search(r'"ray\[.*\]==([\d.]+)\.\*"', (ROOT / "pyproject.toml").read_text())
    assert pinned and job["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{pinned[1]}.")


def image_user() -> int:
    return int(re.search(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[1])
