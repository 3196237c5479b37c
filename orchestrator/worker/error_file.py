"""A worker under a supervisor: its log file, and the file in which it reports errors that no retry can cure.

A supervisor such as Ray restarts a worker whatever it died of. That is right for lost machines and wrong for errors
that would happen again. Those are written to `failure.json`, which the driver reads; a worker that finds the file
returns at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minilm.data.errors import DataError
from minilm.data.read.quarantine import QuarantineGrew
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import InfrastructureError, NoProgress, UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.lease import Fence, Superseded
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.system.write_errors import is_final
from minilm.orchestrator.train.distributed import own_rank
from minilm.orchestrator.worker.crash_loop import MAX_FAILURES, count_start_failure
from minilm.orchestrator.worker.errors import Evicted, PeerFailed

log = logging.getLogger(__name__)

PEER_REPORT_SECONDS = 1.0
PROMISED_REPORT_SECONDS = 30.0


def log_to_file(spec: StageSpec) -> None:
    """Write this worker's log to `worker-<rank>.log` in the stage's folder, which the driver's errors name.

    If that file cannot be opened, the log stays on standard error; the run soon ends with an error that says why.
    """
    try:
        handler = logging.FileHandler(StageFolder(Path(spec.folder)).worker_log(own_rank()))
    except OSError as error:
        log.warning("no log file: %s", error)
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    log.info("rank %d is %s", own_rank(), Process.this())


def run_reporting(
    spec: StageSpec,
    on_step: Callable[[int], None] | None = None,
    eviction_announced: Callable[[], bool] = lambda: False,
) -> bool:
    """`loop.run_stage`, but an error that no retry can cure is written to `failure.json` instead of raised.

    Such errors are bad input, storage that is full or cannot be written, and any error that ends the start three times
    in a row. Returns False then, and also once a newer driver has taken over the work directory. Raises
    `InfrastructureError` if `failure.json` cannot be written either.
    """
    folder = StageFolder(Path(spec.folder))
    try:
        Fence(spec.lease).check()
        if reported(spec):
            return False
        from minilm.orchestrator.worker.loop import run_stage

        return run_stage(spec, on_step, eviction_announced)
    except (UserError, DataError, ModelError) as error:
        message, exit_code = str(error), getattr(error, "exit_code", UserError.exit_code)
    except QuarantineGrew as error:  # all workers start again; max_quarantined_share bounds how often
        log.warning("stage %s: %s", spec.stage, error)
        raise
    except Superseded as error:
        log.warning("stage %s: %s", spec.stage, error)
        return False
    except Evicted as error:  # the supervisor starts another worker
        log.warning("stage %s: %s", spec.stage, error)
        raise
    except Exception as error:
        if is_final(error):
            exit_code = UserError.exit_code
            message = (
                f"stage {spec.stage}: no space left on the disk of {spec.folder}; its last checkpoint is whole: free "
                f"some space and run the same command again"
            )
        else:
            if reported_soon(spec, error):  # the error of a peer has ended this rank too
                return False
            text = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            )
            log.exception("stage %s: %s", spec.stage, text)
            if count_start_failure(folder.root, own_rank(), text) < MAX_FAILURES:
                raise
            exit_code = NoProgress.exit_code
            message = (
                f"stage {spec.stage}: its workers could not start, {MAX_FAILURES} times in a row, because of {text}; "
                f"the whole error is in {folder.worker_log(own_rank())}; mend that and run the same command again"
            )
    try:
        write_json(folder.failure, {"attempt": spec.attempt, "message": message, "exit_code": exit_code})
    except OSError as error:
        raise InfrastructureError(
            f"{message} (and {folder.failure} cannot be written: {error.strerror or error})"
        ) from error
    return False


def run_alone(spec: StageSpec) -> bool:
    """`run_reporting` without a supervisor: starts again itself when the list of damaged blocks grew."""
    while True:
        with suppress(QuarantineGrew):
            return run_reporting(spec)


def reported(spec: StageSpec) -> bool:
    """True if a worker of this attempt has reported an error that no retry can cure."""
    failure = read_json(StageFolder(Path(spec.folder)).failure)
    return failure is not None and failure["attempt"] == spec.attempt


def reported_soon(spec: StageSpec, error: Exception) -> bool:
    """Wait for a peer's report, longer where `error` says that there will be one, as its disk may be slow.

    This waits for an event and tries no call again, so it is no `RetryPolicy`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    promised = isinstance(error, PeerFailed)
    deadline = time.monotonic() + (PROMISED_REPORT_SECONDS if promised else PEER_REPORT_SECONDS)
    while not reported(spec):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
