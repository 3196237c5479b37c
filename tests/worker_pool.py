"""Real worker processes for tests: torchrun's variables, gloo, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from tests.ports import free_port
from tests.support import has_checkpoint
from tests.teachers import teachers_stay

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["minilm.orchestrator.worker.loop"])


def _work(
    spec: str, environment: dict[str, str], errors: str, dies_after: int | None, hangs_after: int | None
) -> None:
    from minilm.orchestrator.worker import watchdog
    from minilm.orchestrator.worker.error_file import run_reporting

    if hangs_after is not None:
        watchdog.LONG = 100  # a short `stall_seconds` is for its steps, not for its start

    os.environ.update(environment)
    sys.stderr = Path(errors).open("a", buffering=1)  # noqa: SIM115 (for the life of the process)
    os.dup2(sys.stderr.fileno(), 2)

    def die(step: int) -> None:
        if step == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == hangs_after:
            hang_here()

    with teachers_stay():
        done = run_reporting(StageSpec.from_json(spec), die)
    sys.exit(0 if done else 3)


def hang_here() -> None:
    time.sleep(600)


def start(
    spec: StageSpec,
    size: int,
    *,
    dies_after: int | None = None,
    hangs_after: int | None = None,
    only: int | None = None,
) -> list[BaseProcess]:
    """The stage on `size` workers; each exits with 0 when the stage is done, 3 when it is not, or dies of its error.

    `dies_after`, `hangs_after`: after so many steps they (or the rank `only`) kill themselves, or make no other.
    """
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(free_port())}
    Path(spec.folder).mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(size):
        own = shared | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        errors = str(Path(spec.folder) / f"worker-{rank}.log")
        ends = (dies_after, hangs_after) if only in (None, rank) else (None, None)
        processes.append(CONTEXT.Process(target=_work, args=(spec.to_json(), own, errors, *ends)))
        processes[-1].start()
    return processes


def join(processes: list[BaseProcess]) -> list[int]:
    """Exit codes, in the order of ranks."""
    deadline = time.monotonic() + 240  # a bit less than a test has, which says no rank
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, f"rank {processes.index(process)} has not ended"
    return [process.exitcode for process in processes]  # type: ignore[misc]


def kill_at(spec: StageSpec, size: int, rank: int, step: int) -> list[int]:
    """The stage on `size` workers, one of them SIGKILLed as soon as a checkpoint of `step` or later is there; exit
    codes of all, ended by themselves.

    Where we look too late, that rank has killed itself before the last step.
    """
    processes = start(spec, size, dies_after=spec.steps - 1, only=rank)
    while processes[rank].is_alive() and not has_checkpoint(StageFolder(Path(spec.folder)).checkpoints, step):
        time.sleep(0.002)
    processes[rank].kill()
    return join(processes)


def log(spec: StageSpec) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(spec.folder).glob("worker-*.log")))
