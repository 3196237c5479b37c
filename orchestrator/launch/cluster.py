"""The Ray cluster of a run: one that it joins, or one of its own on this machine that ends with the driver."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import InfrastructureError, Stopped, UserError
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.processes import Process, descendants, end_all
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.system.text import one_line

CONNECT_SECONDS = 10
TOKEN_WANTED = (
    "the Ray cluster at {} demands a token, and this environment has none or another one: set RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN (`ray get-auth-token` prints it where the head was started)"
)
STOPPED = "stopped while Ray started; the same command goes on from here"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # between two looks of Ray's controller at its workers
    # for placing a group, without its processes' start; then Ray counts places again
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_prestart_worker_first_driver": "0",  # actors, all that we start, get processes of their own
}
# and for a cluster of the run's own, whose helpers take processor time from its training and stand in no head's way
OWN_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its one node goes when the driver gets a SIGTERM
    "RAY_memory_monitor_refresh_ms": "1000",  # between two looks at the machine's memory
    "AUTOSCALER_METRIC_PORT": "0",  # any free one, and the next too: a head on this machine wants the usual ones
    "DASHBOARD_METRIC_PORT": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",  # of statistics for the dashboard that it has not
    "RAY_gcs_server_port_wait_time_s": "120",  # for its head to answer; Ray's own 20 are short on a busy machine
}


def address_to_join(given: str | None) -> str | None:
    """Of the cluster that a run joins; None where it starts its own."""
    address = given or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


class Cluster:
    """A connection to Ray, made when it is first needed.

    address: the cluster to join (default: RAY_ADDRESS; without one the run starts its own). num_workers: how many its
    own has room for, which never grows. record: a file that lists the processes of its own, for the next driver if
    this one is killed.
    """

    def __init__(self, address: str | None, num_workers: int, record: Path):
        self.address = address_to_join(address)
        if self.address and self.address.startswith(("http://", "https://")):
            raise UserError(
                f"{self.address} is a job server, which takes `ray job submit`; a run joins a cluster at HOST:PORT "
                f"(port 6379 where `ray start --head` chose): give that as --address, or --address local for a cluster "
                f"of the run's own"
            )
        self.num_workers, self.record = num_workers, record
        self.connected = False

    @property
    def is_joined(self) -> bool:
        return self.address is not None

    def connect(self, stop: StopRequest) -> None:
        """Does nothing when connected. In the main thread only: Ray's processes die with the thread that starts them.

        Raises `UserError` where no cluster answers, `InfrastructureError` when Ray does not start, and `Stopped` after
        a SIGTERM meanwhile.
        """
        if self.connected:
            return
        for name, value in (ENVIRONMENT if self.is_joined else ENVIRONMENT | OWN_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        if self.address:
            check_answers(self.address)
        else:
            # known to this process and its clusters only; Ray would write one into the home folder, where the next
            # `ray start` finds it and demands it from then on
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray
        from ray.exceptions import AuthenticationError

        from minilm.orchestrator.launch import ray_private

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address:
            options["address"] = self.address
        else:
            end_leftovers(self.record)
            # "local": without it ray.init() would join whatever cluster this machine has
            options |= {
                "address": "local",
                "resources": {"trainer": self.num_workers},
                "include_dashboard": False,
            }
        if stop.requested:  # while Ray was imported
            raise Stopped(STOPPED)
        others = descendants()
        try:
            if self.address:
                ray_private.authenticate(self.address)
                ray.init(**options)
            else:
                ray_private.read_token_again()
                with ray_private.agent_at_a_free_port():
                    ray.init(**options)
        except AuthenticationError as error:
            raise UserError(TOKEN_WANTED.format(self.address)) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            # no cluster, another version, a bad address
            raise InfrastructureError(
                f"Ray does not start at {self.address or 'this machine'}: {one_line(error)}"
            ) from error
        except SystemExit as error:  # ray.init() replaces the SIGTERM handler by one that exits
            raise Stopped(STOPPED) from error
        finally:
            stop.install()
            if not self.is_joined:
                note([process for process in descendants() if process not in others], self.record)
        self.connected = True

    def leave(self) -> None:
        if self.connected:
            import ray

            ray.shutdown()
            self.connected = False


def note(processes: list[Process], record: Path) -> None:
    """Write the record that `end_leftovers` reads. It is never removed: it names a process such that no later one with
    its number is mistaken for it."""
    with suppress(OSError):  # storage that is full or away: those processes end by themselves
        write_json(record, [asdict(process) for process in processes])


def end_leftovers(record: Path) -> None:
    """End what is left of a killed driver's own cluster: Ray's agents look for their dead head for a minute."""
    # an unreadable record, or one of another version or user: those processes exit on their own within a minute
    with suppress(OSError, ValueError, TypeError):
        end_all(Process(**fields) for fields in read_json(record) or [])


def check_answers(address: str) -> None:
    """Raise `UserError` if nobody listens at HOST:PORT: `ray.init` would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto" and the like: Ray finds out by itself, at once
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): start one with `ray start --head`, "
            f"or drop --address and RAY_ADDRESS for a local one"
        ) from error
