"""Where an attempt starts: rank 0 chooses a checkpoint, threads and precision; all ranks load and use the same.

Rank 0 takes the newest sound checkpoint of the stage. Without one, the stage starts at step 0 from the initialisation
that the recipe asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.format import Fingerprints, ResumeState
from minilm.orchestrator.checkpoint.store import CheckpointStore
from minilm.orchestrator.feed.loader import RowLoader
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.system.write_errors import writing
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.numerics import PRECISIONS, choose_precision, choose_threads
from minilm.orchestrator.train.step import StudentState
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard
from minilm.orchestrator.worker.errors import PeerFailed
from minilm.orchestrator.worker.failures import no_progress
from minilm.orchestrator.worker.until import UntilPoints

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """The first step to compute (from 0), its precision, the pieces that each micro-batch is computed in, and at how
    many steps the stage ends as far as that is known."""

    step: int
    precision: str
    num_chunks: int
    steps: int


def resume(
    spec: StageSpec,
    world: World,
    *,
    store: CheckpointStore,
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
    fingerprints: Fingerprints,
    row_loader: RowLoader,
    fence: Fence,
    until: UntilPoints,
    crash_loop_guard: CrashLoopGuard | None,
) -> Start:
    """Load the chosen checkpoint into `models` and `students`, and begin to read rows at its step.

    until: is given the points that there are.
    crash_loop_guard: on rank 0 only, where the attempt is counted. Raises there `NoProgress` after attempts that died
    at the same step and what `checkpoint.restore_newest` raises; on the other ranks `PeerFailed` then. Raises
    `QuarantineGrew` if the ranks have read different lists of damaged blocks.
    """
    found: tuple[int, ResumeState] | None = None
    error: Exception | None = None
    if crash_loop_guard:
        try:
            fence.check()
            found = checkpoint.restore_newest(store, models, students, fingerprints)
            until.restore(
                found[1].points if found else {},
                read_all_metrics(StageFolder(Path(spec.folder)).heldout_metrics),
            )
            spec = replace(spec, steps=until.num_steps())
            begin_attempt(spec, row_loader, crash_loop_guard, found[0] if found else 0)
        except Exception as problem:  # raised after the broadcast, which the other ranks wait for
            error = problem
    step, state = found if found else (0, None)
    fixed_threads = spec.runtime.gradient_sum == "exact" and world.device.type == "cpu"
    threads = choose_threads(spec.runtime.threads, state.threads if state else None, exact=fixed_threads)
    precision = choose_precision(spec.runtime.precision, state.precision if state else None, world.device)
    failed, step, steps, threads, precision_index, quarantine_digest = world.broadcast(
        [
            error is not None,
            step,
            spec.steps,
            threads,
            PRECISIONS.index(precision),
            row_loader.quarantine_mask.digest,
        ]
    )
    if error is not None:
        raise error
    if failed:
        raise PeerFailed("rank 0 failed to resume; see worker-0.log")
    row_loader.quarantine_mask.check_rank_zero(quarantine_digest)
    if fixed_threads:
        torch.set_num_threads(threads)
    if step and not state:
        state = checkpoint.restore_step(store, step, models, students)
    row_loader.begin(step, state.ledger if state else {})
    if world.is_rank_zero:
        log.info("stage %s: %s", spec.stage, f"resumes at step {step}" if step else "starts")
    return Start(step, PRECISIONS[precision_index], state.parts if state else 1, steps)


def begin_attempt(spec: StageSpec, row_loader: RowLoader, guard: CrashLoopGuard, first: int) -> None:
    """Count an attempt that starts at step `first`. Raises `NoProgress` if too many died at the same step before."""
    with writing(StageFolder(Path(spec.folder)).root):
        died_at = guard.begin(first)
    if died_at is not None:
        raise no_progress(spec, row_loader.stream, died_at)
