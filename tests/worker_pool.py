"""Real worker processes for tests: torchrun's variables, gloo, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from support import free_port, has_checkpoint
from teachers import teachers_stay

from orchestrator.stage import StageFolder, StageJob

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["orchestrator.worker"])


def _work(
    job: str, environment: dict[str, str], errors: str, dies_after: int | None, hangs_after: int | None
) -> None:
    from orchestrator import guards
    from orchestrator.reporting import run_reporting

    if hangs_after is not None:
        guards.LONG = 100  # a short `stall_seconds` is for its steps, not for its start

    os.environ.update(environment)
    sys.stderr = Path(errors).open("a", buffering=1)  # noqa: SIM115 (for the life of the process)
    os.dup2(sys.stderr.fileno(), 2)

    def die(step: int) -> None:
        if step == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == hangs_after:
            hang_here()

    with teachers_stay():
        done = run_reporting(StageJob.from_json(job), die)
    sys.exit(0 if done else 3)


def hang_here() -> None:
    time.sleep(600)


def start(
    job: StageJob, size: int, *, dies_after: int | None = None, hangs_after: int | None = None
) -> list[BaseProcess]:
    """The job on `size` workers; each exits with 0 when the stage is done, 3 when it is not, or dies of its error.

    `dies_after`, `hangs_after`: after so many steps they kill themselves, or make no other.
    """
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(free_port())}
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(size):
        own = shared | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        errors = str(Path(job.folder) / f"worker-{rank}.log")
        processes.append(
            CONTEXT.Process(target=_work, args=(job.to_json(), own, errors, dies_after, hangs_after))
        )
        processes[-1].start()
    return processes


def join(processes: list[BaseProcess], timeout: float = 60.0) -> list[int]:
    """Exit codes, in the order of ranks."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, f"rank {processes.index(process)} has not ended"
    return [process.exitcode for process in processes]  # type: ignore[misc]


def kill_at(processes: list[BaseProcess], rank: int, job: StageJob, step: int) -> list[int]:
    """SIGKILL one rank as soon as a checkpoint of `step` or later is there; exit codes of all, ended by themselves."""
    folder = StageFolder(Path(job.folder)).checkpoints
    deadline = time.monotonic() + 60
    while not has_checkpoint(folder, step):
        assert all(process.is_alive() for process in processes), log(job)
        assert time.monotonic() < deadline, log(job)
        time.sleep(0.002)
    os.kill(processes[rank].pid or 0, signal.SIGKILL)
    return join(processes, 30)


def log(job: StageJob) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(job.folder).glob("worker-*.log")))
