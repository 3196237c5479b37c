"""What ends a stage instead of letting it go on wrongly or for ever, each with an error that names the rows.

Updates that are not finite; attempts that die at the same step; a process that makes no step (its stacks go to the
log, and it ends itself, so that a supervisor replaces it).
"""

from __future__ import annotations

import faulthandler
from datetime import timedelta
from pathlib import Path

from data.stream import Stream
from orchestrator.attempts import MAX_FAILURES
from orchestrator.errors import NoProgress, UserError
from orchestrator.files import write_json
from orchestrator.journal import Due
from orchestrator.stage import StageFolder, StageJob
from orchestrator.storage import writing
from orchestrator.world import PEER_TIMEOUT

NAMED_ROWS = 8
LONG = 10  # start-up, evaluation and export may take so many times as long as a step
REARM_SECONDS = 1.0


def name_rows(stream: Stream, step: int, record: Path) -> str:
    """The rows of a step (from 0), in words; all of them go into the file `record`."""
    rows = [int(row) for i in range(stream.num_micro_batches) for row in stream.row_ids(step, i)]
    with writing(record.parent):
        write_json(record, {"step": step, "row_ids": rows})
    named = ", ".join(map(str, rows[:NAMED_ROWS]))
    return f"rows {named}" + (f", … ({len(rows)} rows, all in {record})" if len(rows) > NAMED_ROWS else "")


def check_finite(job: StageJob, stream: Stream, student: str, refused: list[int]) -> None:
    """Raise `UserError` when a student has come to a stop, or skipped more updates than it may.

    `refused`: see `StudentState`, read from the device by the caller.
    """
    count, step, stopped = refused
    if not stopped and count <= job.max_skipped_steps:
        return
    what = f"stage {job.stage}: the loss or gradient of student {student} is not finite at step {step}"
    if not stopped:
        what += f", and {count} updates were skipped (compute.max_skipped_steps is {job.max_skipped_steps})"
    raise UserError(
        f"{what}, of {name_rows(stream, step, StageFolder(Path(job.folder)).failed_step)}; no weight has moved by it; "
        f"lower peak_lr (now {job.peak_lr}) or set max_gradient_norm; where only these rows are at fault, "
        f"compute.on_nonfinite=skip leaves such updates out; the same command goes on from the last checkpoint"
    )


def no_progress(job: StageJob, stream: Stream, step: int) -> NoProgress:
    """`step`: the one at which the attempts died; `job.steps` where none was left and only the export was."""
    folder = StageFolder(Path(job.folder))
    if step >= job.steps:
        return NoProgress(
            f"stage {job.stage}: {MAX_FAILURES} attempts in a row ended while they exported the students, all "
            f"{job.steps} steps being made; look at worker-*.log in {folder.root}; the same command tries again"
        )
    return NoProgress(
        f"stage {job.stage}: {MAX_FAILURES} attempts in a row ended while they computed step {step}, of "
        f"{name_rows(stream, step, folder.failed_step)}; look at worker-*.log in {folder.root}; the same command "
        f"tries again"
    )


def peer_timeout(job: StageJob) -> timedelta:
    """How long a worker waits for the others: as long as one of them may be busy with what takes long."""
    return max(PEER_TIMEOUT, timedelta(seconds=LONG * job.stall_seconds))


class Watchdog:
    """Ends the process, with the stacks of all its threads in `log`, when nobody has said `alive` for `seconds`."""

    def __init__(self, log: Path, seconds: float):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self._file = log.open("a", encoding="utf-8")
        self._due = Due(min(REARM_SECONDS, seconds / 4))  # a step has so much less
        self.expect_long()

    def expect_long(self) -> None:
        """What comes now may take `LONG` times as long."""
        self._arm(self.seconds * LONG)

    def alive(self) -> None:
        if self._due() or self._armed != self.seconds:
            self._arm(self.seconds)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _arm(self, seconds: float) -> None:
        self._armed = seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)
