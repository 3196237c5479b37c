"""The launcher that uses Ray Train: the driver's side. What Ray runs is in `train_callbacks`.

Ray and PyTorch are imported in functions: a run that goes on starts Ray at once and imports the rest beside it.

Ray supervises: it places the workers, watches them and starts them again. What they have computed is in our own
checkpoints, so Ray's are not used, nothing is reported to it, and every attempt gets a fresh run name. Workers ask
only for an exclusive resource, `{"trainer": 1}` or a GPU: Ray Train counts total resources, so a CPU that another
actor holds would otherwise stall a run for ever (docs/runs.md).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minilm.orchestrator.errors import InfrastructureError, Stopped, UserError
from minilm.orchestrator.launch.base import (
    STOPPED_BETWEEN,
    Item,
    Launcher,
    LaunchOptions,
    Result,
    Show,
    run_in_thread,
)
from minilm.orchestrator.launch.claims import Claim
from minilm.orchestrator.launch.cluster import Cluster, address_to_join
from minilm.orchestrator.launch.reservations import (
    cancel_reservations,
    forget_reservation,
    note_reservation,
    noted_reservations,
)
from minilm.orchestrator.launch.resources import missing_resources, pick_resource, starved, wait_for_resources
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.malloc import malloc_environment
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.system.text import one_line

if TYPE_CHECKING:
    from minilm.orchestrator.launch.liveness import Heartbeats

log = logging.getLogger(__name__)

RESIZE_SECONDS = "MINILM_RESIZE_SECONDS"  # how often an elastic run looks for free resources (60)
NICENESS = "RAY_worker_niceness"  # of Ray, which every process of its workers reads
KILL_SECONDS = 60
MAX_ERROR_CHARS = 200
JOB_STOP_SECONDS = (
    "RAY_JOB_STOP_WAIT_TIME_S"  # which `ray job stop` waits; it goes into the job's runtime environment
)
FEW_SECONDS = 60  # for a step and a save
NOTHING_TO_COUNT = (
    "compute.workers is auto, and the Ray cluster has neither GPUs nor `trainer`s to count, only CPUs; give a number, "
    "as --set compute.workers=2, or start its nodes with `ray start --resources '{\"trainer\": 1}'`"
)


class RayLauncher(Launcher):
    """Workers on a Ray cluster: the one at `address` or RAY_ADDRESS, or one of the run's own on this machine."""

    def __init__(self, options: LaunchOptions, stop: StopRequest):
        super().__init__(options, stop)
        self.cluster = Cluster(options.address, options.workers[1], options.run.cluster)
        self.resource = ""  # of which each worker takes one; decided by `allocate`
        # nobody else is on a cluster of the run's own, and Ray's client can't ask which drivers live
        shared = self.cluster.address is not None and not self.cluster.address.startswith("ray://")
        self.claim = Claim(f"{Process.this()} in {options.run.root}") if shared else None

    @staticmethod
    def joins(address: str | None) -> bool:
        return address_to_join(address) is not None

    @property
    def is_here(self) -> bool:
        return not self.cluster.is_joined

    def prepare(self, show: Show) -> None:
        if not self.cluster.connected:
            warn_of_early_kill()
            show("starting Ray", True)
            self.cluster.connect(self.stop)

    def allocate(self, spec: StageSpec, show: Show) -> StageSpec:
        if self.options.auto and pick_resource(self.options.device, 1) == "CPU":
            raise UserError(NOTHING_TO_COUNT)
        self.resource = wait_for_resources(
            self.options.device,
            self.options.workers[0],
            wait_seconds=self.options.wait_seconds,
            grows=self.cluster.is_joined,
            stop=self.stop,
            show=show,
            claim=self.claim,
        )
        # decided once, so that no worker takes a GPU that Ray has not given it
        device = "cuda" if self.resource == "GPU" else "cpu"
        return replace(spec, runtime=replace(spec.runtime, device=device))

    def start(self, spec: StageSpec) -> Future[None]:
        """Start the stage with the fewest to the most workers, one `resource` each.

        Any number of failures is survived as long as steps are made: the workers themselves end a run whose same step
        keeps failing (`worker.crash_loop`).
        """
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from minilm.orchestrator.launch.ray_private import requester_of
        from minilm.orchestrator.launch.train_callbacks import StageCallback, train_function
        from minilm.orchestrator.worker.watchdog import peer_timeout

        least, most = self.options.workers
        folder = StageFolder(Path(spec.folder))
        trainer = TorchTrainer(
            train_function,
            train_loop_config={"spec": spec.to_json()},
            scaling_config=ScalingConfig(
                num_workers=most if least == most else (least, most),
                use_gpu=self.resource == "GPU",
                resources_per_worker={self.resource: 1},
                elastic_resize_monitor_interval_s=float(os.environ.get(RESIZE_SECONDS, "60")),
            ),
            torch_config=TorchConfig(
                backend="nccl" if self.resource == "GPU" else "gloo",
                timeout_s=int(peer_timeout(spec).total_seconds()),
            ),
            run_config=RunConfig(
                name=spec.attempt,
                storage_path=str(folder.root / "ray"),
                failure_config=FailureConfig(max_failures=-1),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[StageCallback(spec, self.resource, least)],
                worker_runtime_env={"env_vars": worker_environment()},
            ),
        )
        if self.cluster.is_joined:  # what Ray reserves on a cluster of the run's own ends with the driver
            cancel_reservations(self.options.run)
            note_reservation(folder, requester_of(trainer))

        def fit() -> None:
            try:
                trainer.fit()
            finally:
                shutil.rmtree(folder.root / "ray", ignore_errors=True)
                forget_reservation(folder)

        return run_in_thread(fit)

    def supervise(
        self, spec: StageSpec, beats: Heartbeats, say: Callable[[str], None]
    ) -> Callable[[bool], str]:
        from minilm.orchestrator.launch.liveness import Supervisor

        least = self.options.workers[0]
        supervisor = Supervisor(
            spec,
            beats,
            wait_seconds=self.options.wait_seconds,
            kill=kill_worker,
            lacking=lambda: (
                missing_resources(self.resource, least) or starved(self.resource, least, self.claim)
            ),
            say=say,
        )

        def watch(stop_requested: bool) -> str:
            if self.claim and beats.newest:
                self.claim.resize(beats.newest["workers"])
            return supervisor(stop_requested)

        return watch

    def abandon(self, spec: StageSpec) -> None:
        """Workers that are not there can't end: without its cluster, `fit` ends with an error."""
        cancel_reservations(self.options.run)
        self.cluster.leave()

    def raise_failure(self, spec: StageSpec, error: BaseException) -> NoReturn:
        if isinstance(cause := getattr(error, "controller_failure", None), UserError):  # of StageCallback
            raise cause
        why = " ".join(str(error).split())
        if len(why) > MAX_ERROR_CHARS:
            end = why[-MAX_ERROR_CHARS:]
            why = "… " + (end.partition(" ")[2] or end)
        raise InfrastructureError(
            f"stage {spec.stage}: Ray gave up ({why}); the workers' logs are {spec.folder}/worker-*.log; the same "
            f"command goes on from the last checkpoint"
        ) from error

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """As Ray tasks, as many at once as there are `resource`s; Ray does those of a lost node again."""
        import ray

        resource = pick_resource(self.options.device, 1)
        asked: dict[str, Any] = {"num_cpus": 0, "resources": {resource: 1}}
        if resource in ("GPU", "CPU"):
            asked = {"num_cpus": int(resource == "CPU"), "num_gpus": int(resource == "GPU")}
        task = ray.remote(work).options(**asked, runtime_env={"env_vars": worker_environment()})
        waiting = [task.remote(item) for item in items]
        for reference in waiting:
            while not ray.wait([reference], timeout=0.5)[0]:
                if self.stop.requested:
                    for other in waiting:
                        ray.cancel(other, force=True)
                    raise Stopped(STOPPED_BETWEEN)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise InfrastructureError(
                    f"Ray gave an evaluation up ({one_line(error)}); the same command goes on from what is done"
                ) from error

    def close(self) -> None:
        """Withdraw what a dead driver had reserved, even where no stage was left to run, and leave the cluster."""
        try:
            if self.cluster.is_joined and noted_reservations(self.options.run) and not self.stop.requested:
                with suppress(UserError, InfrastructureError, Stopped):  # a cluster that is gone has none
                    self.cluster.connect(self.stop)
                    cancel_reservations(self.options.run)
        finally:
            self.cluster.leave()  # Ray drops the claim's driver from its list


def kill_worker(process: Process) -> bool:
    """SIGKILL a worker on whatever node of the connected cluster; False if it had ended, or its node is away."""
    if process.is_here:
        return process.kill()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        nodes = ray.nodes()
    except Exception as error:  # whatever Ray raises while its head is away
        log.warning("%s could not be ended: %s", process, error)
        return False
    for node in nodes:
        if node["Alive"] and node["NodeManagerHostname"] == process.host:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(Process.kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            try:
                return bool(ray.get(task.remote(process), timeout=KILL_SECONDS))
            except Exception as error:  # whatever Ray raises for a node that goes away meanwhile
                log.warning("%s could not be ended: %s", process, error)
    return False


def warn_of_early_kill() -> None:
    """Say under `ray job submit` that `ray job stop` will kill this driver, and so its workers, before they have saved.

    Ray reads the time in the process that started this one, whose environment this one has.
    """
    seconds = os.environ.get(JOB_STOP_SECONDS, "3")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and seconds.isdecimal() and int(seconds) < FEW_SECONDS:
        log.warning(
            "`ray job stop` will kill this run after %s s, saved or not; to let it save at its next step boundary, "
            'submit it with --runtime-env-json \'{"env_vars": {"%s": "600"}}\'',
            seconds,
            JOB_STOP_SECONDS,
        )


def worker_environment() -> dict[str, str]:
    """Environment variables of Ray's workers: the allocator's settings, and the driver's own priority.

    Ray would start them at niceness 15; beside a busy program on each core they would then hardly make a step
    (docs/benchmarks-log.md, 2026-11-23).
    """
    return malloc_environment() | {NICENESS: os.environ.get(NICENESS, "0")}
