"""One stage → Ray Train workers. The only file that imports Ray for training; imports it when called.

Ray supervises: it places the workers, watches them and starts them again. What they have computed is in our own
checkpoints, so Ray's are not used, nothing is reported to it, and every attempt gets a fresh run name. Workers ask
only for an exclusive resource, `{"trainer": 1}` or a GPU: Ray Train counts total resources, so a CPU that another
actor holds would otherwise stall a run for ever (docs/architecture.md, "Ray's rough edges").
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.stage import StageJob

log = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT_SECONDS = 300
MAX_FAILURES = 3
CONNECT_SECONDS = 10


@contextmanager
def ray_cluster(address: str | None, max_workers: int) -> Iterator[None]:
    """Connect to `address` (or RAY_ADDRESS), else start a local cluster that ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    given = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if given:
        check_answers(given)
        options["address"] = given
    else:
        options |= {"resources": {"trainer": max_workers}, "include_dashboard": False}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


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


def worker_resources(min_workers: int, use_gpu: bool) -> dict[str, float]:
    """What one worker asks for on the connected cluster. Raises `UserError` if `min_workers` of it are not there."""
    import ray

    total = ray.cluster_resources()
    name = "GPU" if use_gpu else "trainer" if "trainer" in total else "CPU"
    if total.get(name, 0) < min_workers:
        raise UserError(
            f"the Ray cluster has {total.get(name, 0):g} {name}, the recipe asks for {min_workers} workers with one "
            f"each; lower compute.workers or add nodes"
            + (
                ""
                if use_gpu
                else " (`ray start --resources '{\"trainer\": 1}'` gives a node a place for one)"
            )
        )
    return {name: 1}


def train_function(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    from orchestrator.worker import log_to_file, run_reporting

    job = StageJob.from_json(config["job"])
    log_to_file(job)
    run_reporting(job)


def start_ray(job: StageJob, workers: int | tuple[int, int], pool: ThreadPoolExecutor) -> Future[None]:
    """Start the stage on the connected cluster; the future ends when its workers have returned, or with Ray's error."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    min_workers = workers if isinstance(workers, int) else workers[0]
    use_gpu = job.device == "cuda"
    storage = Path(job.folder) / "ray"
    trainer = TorchTrainer(
        train_function,
        train_loop_config={"job": job.to_json()},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=worker_resources(min_workers, use_gpu)
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=PROCESS_GROUP_TIMEOUT_SECONDS
        ),
        run_config=RunConfig(
            name=job.attempt,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        finally:
            shutil.rmtree(storage, ignore_errors=True)

    return pool.submit(fit)


def start_inline(job: StageJob, pool: ThreadPoolExecutor) -> Future[None]:
    """Run the same worker in this process, without Ray: rank and size come from the environment."""
    from orchestrator.worker import run_reporting

    def work() -> None:
        run_reporting(job)

    return pool.submit(work)
