"""What a connected Ray cluster has for the workers of a run, and the wait until enough of it is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minilm.orchestrator.errors import InfrastructureError, Stopped, UserError
from minilm.orchestrator.launch.claims import SETTLE_SECONDS, Claim
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.system.text import duration, one_line

WAITING = ("PENDING", "RESCHEDULING")  # of a placement group
RELEASE_SECONDS = 10.0  # until Ray has taken back the resources of the stage before
REMEDIES = {
    "GPU": "add nodes with GPUs, lower compute.workers or use --set compute.device=cpu",
    "trainer": "lower compute.workers or add nodes (`ray start --resources '{\"trainer\": 1}'` gives a node one)",
    "CPU": "lower compute.workers or add nodes",
}


def cluster_resources(*, free: bool = False) -> dict[str, float]:
    """The resources of all nodes by name: the total, or what is free. Raises `InfrastructureError` without a head."""
    import ray

    with answering():
        return ray.available_resources() if free else ray.cluster_resources()


@contextmanager
def answering() -> Iterator[None]:
    """Whatever Ray raises while its head is away becomes an `InfrastructureError`."""
    try:
        yield
    except Exception as error:
        raise InfrastructureError(
            f"the Ray cluster does not answer ({one_line(error)}); the same command goes on"
        ) from error


def pick_resource(device: str, least: int) -> str:
    """The resource of which every worker takes one: a GPU, the exclusive `trainer`, or where there is none a CPU."""
    total = cluster_resources()
    gpu = device == "cuda" or (device == "auto" and total.get("GPU", 0) >= least)
    return "GPU" if gpu else "trainer" if "trainer" in total else "CPU"


def missing_resources(resource: str, least: int) -> str:
    """What the connected cluster has not got for `least` workers with one `resource` each; "" if nothing."""
    total = cluster_resources().get(resource, 0)
    if total >= least:
        return ""
    return f"the Ray cluster has {total:g} {resource}, the recipe asks for {least}, one for each worker"


def occupied(resource: str, least: int, claim: Claim | None = None) -> str:
    """How little of `resource` is free for `least` workers, and who has the rest; "" if enough. Ray Train counts the
    total instead, and would wait for ever. `claim`: of this run, where others may have theirs."""
    free = cluster_resources(free=True).get(resource, 0)
    with answering():
        ahead = claim.ahead(resource) if claim else []
    left = min(free, cluster_resources().get(resource, 0) - sum(places for _, places in ahead))
    if left >= least:
        return ""
    holders = ", ".join(f"{places} held by {holder}" for holder, places in ahead)
    return f"{max(left, 0):g} of {least} {resource} are free, {holders or 'others hold the rest'}"


def starved(resource: str, least: int, claim: Claim | None = None) -> str:
    """Workers that have been asked for and can't be placed, in words; "" if all have places, whoever asked."""
    from ray.util import placement_group_table

    with answering():
        waiting = any(group["state"] in WAITING for group in placement_group_table().values())
    return occupied(resource, least, claim) if waiting else ""


def wait_for_resources(
    device: str,
    least: int,
    *,
    wait_seconds: float,
    grows: bool,
    stop: StopRequest,
    show: Callable[[str, bool], None],
    claim: Claim | None = None,
) -> str:
    """The resource a worker takes, once enough of it is free and claimed; `show(text, force)` says what is waited for.

    A cluster that never `grows` is not waited for. Raises `UserError` when the cluster hasn't got it in time,
    `InfrastructureError` when others don't give it back or the cluster does not answer, `Stopped` on request.
    """
    began = time.monotonic()
    while True:
        resource = pick_resource(device, least)
        problem = missing_resources(resource, least)
        busy = "" if problem else occupied(resource, least, claim)
        if not (problem or busy):
            if claim is None or claim.covers(resource, least):
                return resource
            with answering():
                claim.make(resource, least, time.time())
            time.sleep(SETTLE_SECONDS)
            busy = occupied(resource, least, claim)
            with answering():
                if not busy:
                    claim.confirm()
                    return resource
                claim.withdraw()
        waited = time.monotonic() - began
        if problem and (waited >= wait_seconds or not grows):
            raise UserError(f"{problem}; {REMEDIES[resource]}")
        if busy and waited >= max(wait_seconds, RELEASE_SECONDS):
            raise InfrastructureError(
                f"{busy}; compute.wait_seconds is {wait_seconds:g}; the same command tries again"
            )
        if stop.requested:
            raise Stopped("stopped while waiting for the cluster; the same command goes on from here")
        timer = f"({duration(waited)} of {duration(wait_seconds)})"
        show(f"waiting for the cluster: {problem or busy} {timer}", waited < 1)
        time.sleep(1)
