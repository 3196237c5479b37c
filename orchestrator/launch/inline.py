"""The launcher that needs no cluster: the worker runs in the driver's process.

Rank and number of workers come from the environment. The worker's own watchdog ends this process when it hangs, so
nobody supervises it from outside.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import NoReturn

from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.launch.base import Launcher, run_in_thread
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.malloc import keep_freed_memory


class InlineLauncher(Launcher):
    """One worker, a thread of this process."""

    alone = is_here = True

    @staticmethod
    def configure_process() -> None:
        keep_freed_memory()

    def start(self, spec: StageSpec) -> Future[None]:
        from minilm.orchestrator.worker.error_file import run_alone  # PyTorch takes seconds to import

        def work() -> None:
            run_alone(spec)

        return run_in_thread(work)

    def raise_failure(self, spec: StageSpec, error: BaseException) -> NoReturn:
        if isinstance(error, OSError):
            raise InfrastructureError(
                f"stage {spec.stage}: storage gave up ({error}); the same command goes on from the last checkpoint"
            ) from error
        raise error  # a defect of ours keeps its traceback
