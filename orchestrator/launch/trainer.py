"""One stage → Ray Train workers: the driver's side, which imports Ray when called. What Ray runs is in `under_ray`.

Ray supervises: it places the workers, watches them and starts them again. What they have computed is in our own
checkpoints, so Ray's are not used, nothing is reported to it, and every attempt gets a fresh run name. Workers ask
only for an exclusive resource, `{"trainer": 1}` or a GPU: Ray Train counts total resources, so a CPU that another
actor holds would otherwise stall a run for ever (docs/runs.md).
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.malloc import malloc_environment
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.worker.watchdog import peer_timeout

log = logging.getLogger(__name__)

RESERVATION = "reservation.json"
RESIZE_SECONDS = "MINILM_RESIZE_SECONDS"  # how often an elastic run looks for free places (60)
NICENESS = "RAY_worker_niceness"  # of Ray, which every process of its workers reads
CANCEL_SECONDS = 10
KILL_SECONDS = 60


def end_worker(process: Process) -> bool:
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


def reservations(folder: Path) -> list[Path]:
    """What drivers have noted that they reserved for the stages of a run; `folder`: of one of them."""
    return sorted(folder.parent.glob(f"*/{RESERVATION}"))


def cancel_reservations(folder: Path) -> None:
    """Withdraw what drivers that died had reserved for stages of this run: Ray would keep it for 180 s.

    `folder`: of one of its stages; the dead driver may have worked at another. Uses a private actor of Ray 2.60, so
    any failure is only logged: then the run starts later, not wrongly.
    """
    for path in reservations(folder):
        record = read_json(path)
        if record is None:
            continue
        try:
            import ray
            from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
                get_or_create_autoscaling_coordinator,
            )

            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(
                coordinator.cancel_request.remote(requester_id=record["requester"]), timeout=CANCEL_SECONDS
            )
            path.unlink(missing_ok=True)
        except Exception as error:
            log.warning(
                "the reservation of an earlier run could not be cancelled (%s): it ends within 180 s", error
            )


def start_ray(
    spec: StageSpec, workers: tuple[int, int], place: str, pool: ThreadPoolExecutor, *, joined: bool
) -> Future[None]:
    """Start the stage on the connected cluster with workers[0] to workers[1] workers, a `place` each.

    The future ends when the workers have returned, or with Ray's error. Any number of failures is survived as long
    as steps are made: the workers themselves end a run whose same step keeps failing (`attempts`). `joined`: the
    cluster is not this run's own, so that what Ray reserves for it would outlive a dead driver.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import LoggingConfig

    from minilm.orchestrator.launch.train_callbacks import Callback, Trainer, train_function

    least, most = workers
    folder = Path(spec.folder)
    trainer = Trainer(
        train_function,
        train_loop_config={"spec": spec.to_json()},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=place == "GPU",
            resources_per_worker={place: 1},
            elastic_resize_monitor_interval_s=float(os.environ.get(RESIZE_SECONDS, "60")),
        ),
        torch_config=TorchConfig(
            backend="nccl" if place == "GPU" else "gloo", timeout_s=int(peer_timeout(spec).total_seconds())
        ),
        run_config=RunConfig(
            name=spec.attempt,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[Callback(spec, place, least)],
            worker_runtime_env={"env_vars": worker_environment()},
        ),
        joined=joined,
    )
    if joined:
        cancel_reservations(folder)
        write_json(folder / RESERVATION, {"requester": f"train-{trainer.train_run_context.run_id}"})

    def fit() -> None:
        try:
            trainer.fit()
        finally:
            shutil.rmtree(folder / "ray", ignore_errors=True)
            (folder / RESERVATION).unlink(missing_ok=True)

    return pool.submit(fit)


def worker_environment() -> dict[str, str]:
    """Of workers under Ray, which would start them at niceness 15, behind whatever else runs on their machine:
    beside a busy program on each core they would hardly make a step (docs/benchmarks.md, 2026-11-23)."""
    return malloc_environment() | {NICENESS: os.environ.get(NICENESS, "0")}


def start_inline(spec: StageSpec, pool: ThreadPoolExecutor) -> Future[None]:
    """Run the same worker in this process, without Ray: rank and size come from the environment."""
    from minilm.orchestrator.worker.error_file import run_alone

    def work() -> None:
        run_alone(spec)

    return pool.submit(work)
