"""The wait for a cluster's resources; the cluster is two functions here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from minilm.orchestrator.errors import InfrastructureError, Stopped, UserError
from minilm.orchestrator.launch import resources
from minilm.orchestrator.launch.resources import pick_resource, wait_for_resources


@pytest.fixture
def cluster(monkeypatch):
    """What it has in all, and what is free of it: to be changed, or to be an error."""
    state = SimpleNamespace(total={"trainer": 2.0, "CPU": 4.0}, free={"trainer": 2.0})

    def answer(name: str) -> Any:
        value = getattr(state, name)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(ray, "cluster_resources", lambda: answer("total"))
    monkeypatch.setattr(ray, "available_resources", lambda: answer("free"))
    monkeypatch.setattr(resources, "RELEASE_SECONDS", 0.0)
    return state


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def wait(shown, monkeypatch):
    """`wait_for_resources` by a clock of its own."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def wait(least: int = 2, *, grows: bool = True, seconds: float = 0.0, stop: bool = False) -> str:
        return wait_for_resources(
            "cpu",
            least,
            wait_seconds=seconds,
            grows=grows,
            stop=SimpleNamespace(requested=stop),
            show=lambda text, force: shown.append(text),
        )

    monkeypatch.setattr(resources, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return wait


@pytest.mark.parametrize(
    ("device", "total", "resource"),
    [
        ("auto", {"GPU": 2, "trainer": 1}, "GPU"),
        ("auto", {"GPU": 1, "trainer": 1}, "trainer"),
        ("cuda", {"CPU": 1}, "GPU"),
        ("cpu", {"GPU": 8, "CPU": 1}, "CPU"),
    ],
)
def test_a_worker_takes_a_gpu_the_exclusive_resource_or_a_cpu(cluster, device, total, resource):
    cluster.total = total
    assert pick_resource(device, 2) == resource


def test_resources_that_are_free_are_not_waited_for(cluster, wait, shown):
    assert wait() == "trainer"
    assert not shown


@pytest.mark.parametrize("question", ["total", "free"])
def test_a_head_that_does_not_answer_is_a_matter_of_infrastructure(cluster, wait, question):
    setattr(cluster, question, RuntimeError("GCS\nis away"))
    with pytest.raises(
        InfrastructureError, match=r"does not answer \(GCS is away\); the same command"
    ) as raised:
        wait()
    assert raised.value.exit_code == 10


def test_what_the_cluster_has_not_got_is_the_users_matter(cluster, wait):
    with pytest.raises(UserError, match="has 2 trainer, the recipe asks for 3, .*; lower compute") as raised:
        wait(3, seconds=600, grows=False)
    assert raised.value.exit_code == 2
    with pytest.raises(UserError, match="the recipe asks for 3"):
        wait(3)


def test_what_others_hold_is_waited_for_and_said(cluster, wait, shown):
    cluster.free = {"trainer": 1.0}
    with pytest.raises(InfrastructureError, match="1 of 2 trainer are free, others hold the rest"):
        wait()
    with pytest.raises(Stopped):
        wait(seconds=600, stop=True)
    with pytest.raises(InfrastructureError):
        wait(seconds=1)
    assert shown == ["waiting for the cluster: 1 of 2 trainer are free, others hold the rest (0s of 1s)"]
