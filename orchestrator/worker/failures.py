"""Errors that name the rows of the step they are about: a step that is not finite, a step at which attempts die."""

from __future__ import annotations

from pathlib import Path

import torch

from minilm.data.stream import Stream
from minilm.model.distiller import Distiller
from minilm.orchestrator.errors import NoProgress, UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.write_errors import writing
from minilm.orchestrator.worker.crash_loop import MAX_FAILURES
from minilm.orchestrator.worker.errors import NotFinite

NAMED_ROWS = 8


def name_rows(stream: Stream, step: int, record: Path) -> str:
    """Describes the rows of a step (from 0): the first few by number. All of them are written to the file `record`."""
    rows = [int(row) for i in range(stream.num_micro_batches) for row in stream.row_ids(step, i)]
    with writing(record.parent):
        write_json(record, {"step": step, "row_ids": rows})
    named = ", ".join(map(str, rows[:NAMED_ROWS]))
    return f"rows {named}" + (f", … ({len(rows)} rows, all in {record})" if len(rows) > NAMED_ROWS else "")


def check_finite(spec: StageSpec, stream: Stream, student: str, skipped: list[int]) -> None:
    """Raises `NotFinite` if a student has stopped, or skipped more updates than compute.max_skipped_steps.

    skipped: `StudentState.skipped`, read from the device by the caller.
    """
    count, step, stopped = skipped
    if not stopped and count <= spec.runtime.max_skipped_steps:
        return
    what = f"stage {spec.stage}: the loss or gradient of student {student} is not finite at step {step}"
    if not stopped:
        what += f", and {count} updates were skipped (compute.max_skipped_steps is {spec.runtime.max_skipped_steps})"
    raise NotFinite(
        f"{what}, of {name_rows(stream, step, StageFolder(Path(spec.folder)).failed_step)}; no weight has moved by it; "
        f"lower peak_lr (now {spec.learning_rate.peak_lr}) or set max_gradient_norm; where only these rows are at "
        f"fault, compute.on_nonfinite=skip leaves such updates out; the same command goes on from the last checkpoint",
        step,
    )


@torch.no_grad()
def check_teacher_output(
    spec: StageSpec,
    distiller: Distiller,
    stream: Stream,
    step: int,
    *,
    autocast: torch.dtype | None,
    device: torch.device,
) -> None:
    """Raises `UserError` if the teacher's own output for a row of step `step` (from 0) is not finite: then no learning
    rate is to blame. Computes the teacher's side of the step once more."""
    for index in range(stream.num_micro_batches):
        batch = stream.micro_batch(step, index)
        ids, mask = batch.sequences
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            taps = distiller.teacher_forward(ids, mask).taps
        for tensor in taps.tensors(distiller.objective.fields):
            finite = tensor.isfinite().flatten(1).all(1)
            if not finite.all():
                row = batch.row_of(int((~finite).nonzero()[0]))
                raise UserError(
                    f"stage {spec.stage}: the output of the teacher {spec.teacher_name} is not finite, first in row "
                    f"{row} of step {step}; no learning rate mends that: give another teacher"
                    + (
                        ""
                        if autocast is None
                        else ", or compute.precision=float32 if its numbers are too large"
                    )
                )


def no_progress(spec: StageSpec, stream: Stream, step: int) -> NoProgress:
    """The error for attempts that died at step `step`; `spec.steps` means that they died in the export."""
    folder = StageFolder(Path(spec.folder))
    if step >= spec.steps:
        return NoProgress(
            f"stage {spec.stage}: {MAX_FAILURES} attempts in a row ended while they exported the students, all "
            f"{spec.steps} steps being made; look at worker-*.log in {folder.root}; the same command tries again"
        )
    return NoProgress(
        f"stage {spec.stage}: {MAX_FAILURES} attempts in a row ended while they computed step {step}, of "
        f"{name_rows(stream, step, folder.failed_step)}; look at worker-*.log in {folder.root}; the same command "
        f"tries again"
    )
