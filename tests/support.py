"""Builders shared by the tests of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.manifest import TokenizerInfo
from orchestrator.checkpoint_store import LocalFolder, step_of
from orchestrator.corpora import describe
from orchestrator.data_job import CacheJob, CorpusJob, DataJob
from orchestrator.stage import StageJob, StudentJob


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of the checkpoints in a local store, oldest first."""
    return [folder / name for name in LocalFolder(folder).names()]


def has_checkpoint(folder: Path, step: int) -> bool:
    """Is a checkpoint of `step` or later in a local store? A name may be gone before anybody looks."""
    return any(step_of(path.name) >= step for path in checkpoints_in(folder))


def describe_folder(data: Path) -> DataJob:
    return describe([CorpusJob("only", str(data))])


# of jobs that nobody runs
NO_DATA = DataJob((), "", 32, TokenizerInfo("", 0, 0, 0, 0, 0, 0), "", None, CacheJob())


def make_job(
    data: Path | DataJob,
    teacher: Path,
    folder: Path,
    *,
    students: tuple[tuple[str, int, int], ...] = (("small", 2, 24),),
    dropout: float = 0.1,
    **changes: Any,
) -> StageJob:
    """A stage of 12 steps of 8 rows; `students` are (name, layers, hidden) with the teacher's 4 heads."""
    values: dict[str, Any] = {
        "stage": "first",
        "folder": str(folder),
        "data": data if isinstance(data, DataJob) else describe_folder(data),
        "teacher": str(teacher),
        "teacher_name": "bert",
        "teacher_digest": "",
        "teacher_layer": "last",
        "students": tuple(StudentJob(n, la, h, 4, 4 * h, dropout, "random") for n, la, h in students),
        "objective": {"name": "minilm"},
        "seed": 3,
        "batch": 8,
        "micro_batch": 4,
        "steps": 12,
        "peak_lr": 1e-3,
        "warmup_steps": 3,
        "schedule": "linear",
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-6,
        "weight_decay": 0.01,
        "max_gradient_norm": None,
        "eval_every": None,
        "held_out_rows": 8,
        "log_every": 2,
        "per_head": False,
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "checkpoint_every_steps": 3,
        "checkpoint_every_seconds": 3600.0,
        "keep_checkpoints": 2,
        "keep_every_steps": None,
        "checkpoints": None,
        "reduction": "exact",
        "on_nonfinite": "stop",
        "max_skipped_steps": 10,
        "stall_seconds": 300.0,
        "digest": "digest",
        "attempt": "inline",
    }
    return StageJob(**values | changes)
