"""The wait for a cluster's resources; the cluster is two functions here."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from minilm.orchestrator.errors import InfrastructureError, Stopped, UserError
from minilm.orchestrator.launch import ray_private, resources
from minilm.orchestrator.launch.claims import Claim, claimed_by_others
from minilm.orchestrator.launch.resources import pick_resource, starved, wait_for_resources


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
def meanwhile() -> list[Callable[[], None]]:
    return []


@pytest.fixture
def jobs(monkeypatch):
    """The cluster's store of claims by job, and which job this process is."""
    state = SimpleNamespace(claims={}, own="2")
    monkeypatch.setattr(ray_private, "own_job", lambda: state.own)
    monkeypatch.setattr(ray_private, "read_claims", lambda: dict(state.claims))
    monkeypatch.setattr(ray_private, "write_claim", lambda text: state.claims.update({state.own: text}))
    monkeypatch.setattr(ray_private, "remove_claim", lambda: state.claims.pop(state.own, None))
    return state


def claimed(places: int, *, since: float, confirmed: bool = True, resource: str = "trainer") -> str:
    """What another run has written."""
    holder = "process 7 on elsewhere in /runs/other"
    return json.dumps(
        {"holder": holder, "resource": resource, "places": places, "since": since, "confirmed": confirmed}
    )


@pytest.fixture
def wait(shown, monkeypatch, meanwhile):
    """`wait_for_resources` by a clock of its own; whenever it sleeps, what is in `meanwhile` happens."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if meanwhile:
            meanwhile.pop(0)()

    def wait(
        least: int = 2,
        *,
        grows: bool = True,
        seconds: float = 0.0,
        stop: bool = False,
        claim: Claim | None = None,
    ) -> str:
        return wait_for_resources(
            "cpu",
            least,
            wait_seconds=seconds,
            grows=grows,
            stop=SimpleNamespace(requested=stop),
            show=lambda text, force: shown.append(text),
            claim=claim,
        )

    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 1000 + now[0], sleep=sleep)
    monkeypatch.setattr(resources, "time", clock)
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


def test_a_run_takes_only_what_no_other_run_claims_and_says_who_does(cluster, wait, shown, jobs):
    """The other one is between two stages: all its places are free."""
    jobs.claims["1"] = claimed(1, since=2000.0)
    with pytest.raises(InfrastructureError) as raised:
        wait(seconds=1, claim=Claim("this"))
    held = "1 of 2 trainer are free, 1 held by process 7 on elsewhere in /runs/other"
    assert str(raised.value).startswith(held)
    assert shown == [f"waiting for the cluster: {held} (0s of 1s)"]
    assert list(jobs.claims) == ["1"]
    assert wait(1, claim=Claim("this")) == "trainer"
    jobs.claims["1"] = claimed(8, since=0.0, resource="GPU")
    assert wait(2, claim=Claim("this")) == "trainer", "GPUs are no matter"


def test_a_run_keeps_its_claim_for_its_next_stages(cluster, wait, jobs):
    claim = Claim("process 1 on here in /runs/this")
    assert wait(claim=claim) == "trainer"
    assert json.loads(jobs.claims["2"])["places"] == 2 and claim.confirmed
    jobs.claims["1"] = claimed(2, since=1.0, confirmed=False)  # older by its clock, and not confirmed
    assert wait(claim=claim) == "trainer"
    claim.resize(1)  # elastic: a node has gone
    assert json.loads(jobs.claims["2"])["places"] == 1
    claim.withdraw()
    assert list(jobs.claims) == ["1"]


@pytest.mark.parametrize(("since", "wins"), [(999.0, False), (1001.0, True)])
def test_of_two_runs_that_claim_the_same_places_at_once_the_older_claim_wins(
    cluster, wait, jobs, meanwhile, since, wins
):
    meanwhile.append(lambda: jobs.claims.update({"1": claimed(1, since=since, confirmed=False)}))
    claim = Claim("this")
    if wins:
        assert wait(claim=claim) == "trainer"
    else:
        with pytest.raises(InfrastructureError, match="1 of 2 trainer are free, 1 held by process 7"):
            wait(claim=claim)
    assert ("2" in jobs.claims) is claim.confirmed is wins


def test_of_two_runs_on_a_cluster_that_has_shrunk_one_goes_on(cluster, wait, jobs):
    jobs.claims["1"] = claimed(2, since=5.0)
    younger = Claim("this")
    younger.make("trainer", 2, now=6.0)
    younger.confirm()
    with pytest.raises(InfrastructureError, match="0 of 2 trainer are free, 2 held by"):
        wait(claim=younger)
    older = Claim("this")
    older.make("trainer", 2, now=4.0)
    older.confirm()
    assert wait(claim=older) == "trainer"


def test_a_controller_counts_what_others_claim(jobs):
    jobs.claims = {"1": claimed(3, since=5.0), "2": claimed(2, since=5.0), "3": claimed(1, since=9.0)}
    assert claimed_by_others("trainer") == 4
    assert claimed_by_others("GPU") == 0


@pytest.mark.parametrize(("state", "words"), [("PENDING", "0 of 2 trainer are free"), ("CREATED", "")])
def test_workers_that_wait_for_places_are_told_from_those_that_have_them(cluster, monkeypatch, state, words):
    cluster.free = {}
    monkeypatch.setattr("ray.util.placement_group_table", lambda: {"a": {"state": state}})
    assert starved("trainer", 2).startswith(words) and bool(starved("trainer", 2)) is bool(words)
