"""One attempt at a stage, as the driver sees it: its folder made ready before, what came of it afterwards.

Attempts that died are counted by the workers (`worker.crash_loop`).
"""

from __future__ import annotations

from concurrent.futures import Future

from minilm.orchestrator.checkpoint.format import Fingerprints, check_newest
from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.errors import InfrastructureError, LeaseHeld, NoProgress, Stopped, UserError
from minilm.orchestrator.launch.base import Launcher
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json, write_atomic
from minilm.orchestrator.system.write_errors import writing

FAILURES = {error.exit_code: error for error in (UserError, NoProgress, LeaseHeld, InfrastructureError)}


def begin_attempt(spec: StageSpec, folder: StageFolder) -> None:
    """Make the stage's folder and its checkpoints this attempt's; what an older one left to be read goes."""
    folder.root.mkdir(parents=True, exist_ok=True)
    for stale in (folder.stop_request, folder.failure, folder.done):
        stale.unlink(missing_ok=True)
    take_checkpoints(spec, folder)
    write_atomic(folder.spec, spec.to_json())


def take_checkpoints(spec: StageSpec, folder: StageFolder) -> None:
    """Make checkpoints outside the work directory this attempt's own; whoever wrote them before stops.

    Raises `UserError` when the stage was begun with its checkpoints elsewhere: here it would start again. Another
    recipe's checkpoints are refused before anything is taken: a run may be making them.
    """
    store = open_store(spec.checkpoints, folder.checkpoints)
    before = read_json(folder.spec)
    if before is not None and before.get("checkpoints") != spec.checkpoints and not store.names():
        old = open_store(before.get("checkpoints"), folder.checkpoints)
        if old.names():
            raise UserError(
                f"stage {spec.stage} has checkpoints in {old.where}, and compute.checkpoints is now {store.where}, "
                f"where there are none; copy them there, or set compute.checkpoints back"
            )
    if spec.checkpoints:  # another work directory's run may know the place too
        check_newest(store, Fingerprints.of(spec, spec.data.fingerprint))
        with writing(store.where):
            store.claim(spec.attempt)


def check_outcome(spec: StageSpec, folder: StageFolder, future: Future[None], launcher: Launcher) -> None:
    """Return if this attempt, whose `future` has ended, has finished the stage; otherwise raise why it has not."""
    failure = read_json(folder.failure)
    if failure is not None and failure["attempt"] == spec.attempt:
        raise FAILURES[failure["exit_code"]](failure["message"])
    if (error := future.exception()) is not None:
        launcher.raise_failure(spec, error)
    if not folder.done.exists():
        raise Stopped(f"stage {spec.stage} is stopped; the same command goes on from its last checkpoint")
