"""Builders shared by the tests of the loop."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from minilm.data.format.manifest import TokenizerInfo
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.store import step_of
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec, DataSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import GROUPS, StageSpec, StudentSpec, grouped
from minilm.orchestrator.system.files import read_json


def crowded_folder(folder: Path) -> Path:
    """A user's folder whose files have the names of our top-level folders; to import any of them is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "data.py",
        "model.py",
        "orchestrator.py",
        "recipes.py",
        "utils.py",
        "tests.py",
        "data/__init__.py",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('raise ImportError("a file of the user\'s was imported")\n')
    return folder


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of the checkpoints in a local store, oldest first."""
    return [folder / name for name in LocalStore(folder).names()]


def has_checkpoint(folder: Path, step: int) -> bool:
    """Is a checkpoint of `step` or later in a local store? A name may be gone before anybody looks."""
    return any(step_of(path.name) >= step for path in checkpoints_in(folder))


def finished_as(spec: StageSpec) -> dict[str, Any]:
    """What a finished stage records, whatever hardware it was made on: digests of rows and weights among it."""
    return {
        k: v for k, v in (read_json(StageFolder(Path(spec.folder)).done) or {}).items() if k != "hardware"
    }


def describe_folder(data: Path) -> DataSpec:
    return describe([CorpusSpec("only", str(data))])


# of jobs that nobody runs
NO_DATA = DataSpec((), "", 32, TokenizerInfo("", 0, 0, 0, 0, 0, 0), "", None, CacheSpec())


def make_spec(
    data: Path | DataSpec,
    teacher: Path,
    folder: Path,
    *,
    students: tuple[tuple[str, int, int], ...] = (("small", 2, 24),),
    dropout: float = 0.1,
    **changes: Any,
) -> StageSpec:
    """A stage of 12 steps of 8 rows; `students` are (name, layers, hidden) with the teacher's 4 heads."""
    values: dict[str, Any] = {
        "stage": "first",
        "folder": str(folder),
        "data": data if isinstance(data, DataSpec) else describe_folder(data),
        "teacher": str(teacher),
        "teacher_name": "bert",
        "teacher_digest": "",
        "teacher_layer": "last",
        "students": tuple(StudentSpec(n, la, h, 4, 4 * h, dropout, "random") for n, la, h in students),
        "objective": {"name": "minilm"},
        "seed": 3,
        "batch": 8,
        "micro_batch": 4,
        "steps": 12,
        "peak_lr": 1e-3,
        "warmup_steps": 3,
        "schedule": "linear",
        "decay_steps": None,
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
        "gradient_sum": "exact",
        "on_nonfinite": "stop",
        "max_skipped_steps": 10,
        "stall_seconds": 300.0,
        "digest": "digest",
        "attempt": "inline",
    }
    values |= changes
    keys = {field.name for kind in GROUPS.values() for field in fields(kind)}
    return StageSpec(**{key: value for key, value in values.items() if key not in keys}, **grouped(values))


def change(spec: StageSpec, **changes: Any) -> StageSpec:
    """The specification with other values of a recipe's keys."""
    flat = {key: value for name in GROUPS for key, value in asdict(getattr(spec, name)).items()}
    return replace(spec, **grouped(flat | changes))
