"""Every use of Ray's private modules, with its reason; no other file has one (tests/test_launch_ray_private.py).

Written for Ray 2.60. The test fails where a newer Ray has moved or changed something here. None of it only saves
processor time: without it a run loses steps, starts minutes late or does not end.

callbacks          Ray's public `UserCallback` (ray-project/ray#49819) hears of reports and exceptions only. A callback
                   of the controller is needed to end a run whose workers never start, to save before a resize, and to
                   leave out nodes that do not answer.
train context      Ray's public `get_preemption_info` is a collective of 5 to 9 ms, too slow for every step.
worker group       A resize ends healthy workers without a word: rank 0 is asked first to save (the public guide on
                   elastic training, ray-project/ray#61115, restarts from the last checkpoint).
coordinator        A dead driver's reservation lasts for 180 s, and no public call withdraws it
                   (ray-project/ray#64824 says so for Ray's own clients).
agent port         `ray.init()` has no option for it, and starts its agent at port 52365, which `ray start --head` wants
                   too: beside a local run a head then takes no job.
claims             Ray has no public place for a few words that all drivers of a cluster read, short of an actor, which
                   costs a process; nor a list of live drivers that needs no dashboard.
token              Ray uses a token that lies ready for clusters that it finds, and not for an address. Without it, or
                   with another one, `ray.init()` tries for 20 s and leaves the reason out of its error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from typing import Any

import ray
from ray._private.parameter import RayParams
from ray._private.state import jobs
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.util.placement_group import NODE_ID_LABEL_KEY

log = logging.getLogger(__name__)

CANCEL_SECONDS = 10.0
CLAIMS = "minilm-claims"  # our namespace of the cluster's key-value store


@contextmanager
def agent_at_a_free_port() -> Iterator[None]:
    """A cluster that `ray.init()` starts meanwhile has its agent's HTTP server at any free port."""
    theirs = RayParams.__init__
    RayParams.__init__ = partialmethod(theirs, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        RayParams.__init__ = theirs


def authenticate(address: str) -> None:
    """Use the token that lies ready if the cluster at HOST:PORT demands one and RAY_AUTH_MODE says nothing else.

    A cluster without tokens must be joined without one: this process would demand it from the cluster in its turn, and
    does so as soon as Ray has looked for a token.
    Raises `ray.exceptions.AuthenticationError` where the cluster demands another one, or there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not has_token():
        raise AuthenticationError("there is no token")  # Ray's client would abort this process
    if not address.rpartition(":")[2].isdecimal() or "://" in address:
        return
    try:
        look_at(address)
    except AuthenticationError:
        if "RAY_AUTH_MODE" in os.environ or not has_token():
            raise
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # Ray read it when it was imported
        look_at(address)


def read_token_again() -> None:
    """Have Ray use RAY_AUTH_TOKEN as it is now: it keeps the first token that this process has read, such as the one
    in the home folder of somebody's own `ray.init()`, and a cluster that starts now knows another one."""
    AuthenticationTokenLoader.instance().reset_cache()


def has_token() -> bool:
    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def look_at(address: str) -> None:
    """Raises `ray.exceptions.AuthenticationError` where the cluster's head does not take this process's token."""
    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise
    except Exception as error:  # whatever else is wrong there, `ray.init()` says it
        log.debug("no look at %s: %s", address, error)


class TrainCallback(ControllerCallback, WorkerGroupCallback):
    """The base of a callback in Ray Train's controller, which waits for each call."""


def is_node_drained() -> bool:
    """In a worker: whether Ray has announced that a node of the group is about to go. Costs no communication."""
    return get_train_context().preemption_context.preemption_info is not None


def is_resizing(state: Any) -> bool:
    """Whether the controller's state means that healthy workers are about to be replaced."""
    return isinstance(state, ResizingState)


def call_on_rank_zero(group: Any, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Run a function in the process of rank 0, beside its training. Raises Ray's error if that worker is gone."""
    return ray.get(group.execute_single_async(0, function, *arguments), timeout=seconds)


def delay_resize(group: Any, seconds: float) -> None:
    """Have Ray think that the group started `seconds` later: it resizes none that has just started."""
    state = group.get_worker_group_state()
    group._worker_group_state = replace(state, start_time=state.start_time + seconds)


def cause_of(error: BaseException) -> BaseException:
    """What a worker raised, out of the errors that Ray wraps it in."""
    cause: BaseException = (
        getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error
    )
    return cause


def excluding(node_ids: list[str]) -> dict[str, str] | None:
    """A label selector of all nodes but these; None selects every node."""
    return {NODE_ID_LABEL_KEY: f"!in({','.join(node_ids)})"} if node_ids else None


def requester_of(trainer: Any) -> str:
    """The name under which Ray Train reserves the trainer's resources."""
    return f"train-{trainer.train_run_context.run_id}"


def cancel_reservation(requester: str) -> None:
    """Withdraw the resources that a requester reserved on the connected cluster."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,  # imports all of Ray Data
    )

    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.cancel_request.remote(requester_id=requester), timeout=CANCEL_SECONDS)


def own_job() -> str:
    """The number of this driver's connection to the cluster, in hexadecimal; in an actor its driver's."""
    return str(ray.get_runtime_context().get_job_id())


def write_claim(text: str) -> None:
    """Write what this driver claims, in place of what it claimed before."""
    internal_kv._internal_kv_put(own_job(), text, namespace=CLAIMS)


def remove_claim() -> None:
    internal_kv._internal_kv_del(own_job(), namespace=CLAIMS)


def read_claims() -> dict[str, str]:
    """The claims of all connected drivers by job; those of dead ones are removed."""
    keys = internal_kv._internal_kv_list(
        "", namespace=CLAIMS
    )  # first: who claims later is not taken for dead
    alive = {job["JobID"] for job in jobs() if not job["IsDead"]}
    claims = {}
    for key in keys:
        job, text = key.decode(), internal_kv._internal_kv_get(key, namespace=CLAIMS)
        if job not in alive:
            internal_kv._internal_kv_del(key, namespace=CLAIMS)
        elif text is not None:  # else withdrawn meanwhile
            claims[job] = text.decode()
    return claims
