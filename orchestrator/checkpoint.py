"""The state of a stage between two steps, on disk: whole or absent, verified when read.

A checkpoint is a folder `step-000000120/` with, for each student, its weights and optimiser moments as safetensors
and a `checkpoint.json` that names the step, the job's digest, the data's fingerprint, the SHA-256 of every file, and
`Facts`. It is written under a temporary name, fsynced and renamed; the last `keep` stay, and every n-th step's. It is
removed by renaming it first. So whoever dies when, a folder called `step-…` is whole. The teacher is never in it, and
no random-generator state either: every seed is a function of the step. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.errors import UserError
from orchestrator.files import fsync_folder, write_json
from orchestrator.step import StudentState
from orchestrator.tensorfile import write_tensors

log = logging.getLogger(__name__)

FORMAT = 2
NAME = re.compile(r"step-(\d{9})")
MOMENTS = ("exp_avg", "exp_avg_sq")
DAMAGE = (ValueError, KeyError, SafetensorError, FileNotFoundError)  # ValueError: JSON that is none, too


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: the job's digest and the data's fingerprint."""

    job: str
    data: str


@dataclass(frozen=True)
class Facts:
    """What a run needs to go on exactly, beside tensors and step.

    ledger: `digest` (hex, see `ledger`) with the `seed` and `batch` that it can be recomputed from. threads: CPU
    threads of every worker. parts: into how many each micro-batch is cut (2 after running out of memory).
    """

    ledger: dict[str, Any]
    threads: int
    parts: int

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Facts:
        return cls(meta["ledger"], meta["threads"], meta["parts"])


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def capture(
    models: Mapping[str, torch.nn.Module], students: Sequence[StudentState]
) -> dict[str, dict[str, Tensor]]:
    """The live tensors of a checkpoint by file stem: for each student its whole model and its optimiser's state."""
    parts: dict[str, dict[str, Tensor]] = {}
    for student in students:
        parts[f"{student.name}.model"] = dict(models[student.name].state_dict())
        parts[f"{student.name}.optimizer"] = optimizer_tensors(student)
    return parts


def write(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    identity: Identity,
    facts: Facts,
    *,
    keep: int,
    keep_every: int | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Write the state after `step` updates; drop all but the newest `keep` and every `keep_every`-th step's.

    `parts`: see `capture`; on the CPU. `guard()` is called last before the commit and may raise to prevent it.
    Raises `OSError` as the storage does, and leaves nothing behind then.
    """
    final = folder / f"step-{step:09d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        hashes = {
            f"{stem}.safetensors": write_tensors(temporary / f"{stem}.safetensors", tensors)
            for stem, tensors in parts.items()
        }
        write_json(
            temporary / "checkpoint.json",
            {
                "format": FORMAT,
                "step": step,
                "job": identity.job,
                "data": identity.data,
                "sha256": hashes,
                **asdict(facts),
            },
        )
        fsync_folder(temporary)
        guard()
        temporary.rename(final)
        fsync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            remove(old)
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint; killed in the middle, what is left is not called one."""
    leftover = path.with_name(f".{path.name}.old.tmp")
    path.rename(leftover)
    shutil.rmtree(leftover)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))


def step_of(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found, f"{path} is no checkpoint"
    return int(found[1])


def restore_newest(
    folder: Path,
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
    identity: Identity,
) -> tuple[int, Facts] | None:
    """Load the newest sound checkpoint into `models` and `students`; its step and facts, or None where there is none.

    For the one process that writes to `folder`: what killed saves left is removed, and a damaged checkpoint is
    passed over with a warning, in favour of the one before, and set aside, so that its step can be saved again.
    Storage that fails to answer (ESTALE, EIO, EMFILE, EACCES) is no damage: its `OSError` is raised.
    Raises `UserError` when a checkpoint belongs to another recipe or data set, or when checkpoints exist and none is
    sound.
    """
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged: list[Path] = []
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            meta, tensors = read(path)
        except DAMAGE as error:
            log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, error)
            damaged.append(path)
            continue
        check_identity(path, meta, identity)
        for other in damaged:
            set_aside(other)
        load(meta, tensors, models, students)
        return int(meta["step"]), Facts.of(meta)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} is sound; restore one from a backup, "
            f"or delete the folder to start the stage again"
        )
    return None


def restore_step(
    folder: Path, step: int, models: Mapping[str, torch.nn.Module], students: Sequence[StudentState]
) -> Facts:
    """Load the checkpoint that the main rank has chosen. Raises what `read` raises."""
    meta, tensors = read(folder / f"step-{step:09d}")
    load(meta, tensors, models, students)
    return Facts.of(meta)


def load(
    meta: Mapping[str, Any],
    tensors: Mapping[str, dict[str, Tensor]],
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
) -> None:
    for student in students:
        models[student.name].load_state_dict(tensors[f"{student.name}.model.safetensors"])
        load_optimizer(student, tensors[f"{student.name}.optimizer.safetensors"], meta["step"])


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `damaged-…`; of each step the last one is kept, to be looked at."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def read_meta(path: Path) -> dict[str, Any]:
    """What `checkpoint.json` says. Raises `UserError` when that is no checkpoint of this version."""
    try:
        meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            return meta
        problem = f"has format {meta['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError) as error:
        problem = f"cannot be read ({error})"
    raise UserError(f"checkpoint {path} {problem}; give a folder step-… of a stage's checkpoints")


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A checkpoint's metadata and tensors by file name, every hash checked. Raises ValueError on damage."""
    meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
    tensors = {}
    for name, expected in meta["sha256"].items():
        if sha256_file(path / name) != expected:
            raise ValueError(f"{name} does not have the SHA-256 that checkpoint.json records")
        tensors[name] = load_file(path / name)
    return meta, tensors


def check_identity(path: Path, meta: dict[str, Any], identity: Identity) -> None:
    for what, given, expected in (
        ("recipe", meta["job"], identity.job),
        ("data set", meta["data"], identity.data),
    ):
        if given != expected:
            raise UserError(
                f"checkpoint {path} belongs to another {what} ({given[:12]}, this run has {expected[:12]}); "
                f"use another --workdir, or delete the stage's folder to train it again"
            )


def optimizer_tensors(student: StudentState) -> dict[str, Tensor]:
    """Adam's two moments of every trained parameter, named `<moment>/<parameter>` (none before the first update),
    and `refused` (see `StudentState`)."""
    state = student.optimizer.state
    moments = {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in student.parameters.items()
        if parameter in state
        for moment in MOMENTS
    }
    return moments | {"refused": student.refused}


def load_optimizer(student: StudentState, tensors: dict[str, Tensor], step: int) -> None:
    """Put the moments back. AdamW's own counter is the number of updates that were not refused."""
    refused = tensors["refused"]
    student.refused = refused.to(student.refused.device)
    for name, parameter in student.parameters.items():
        if f"exp_avg/{name}" not in tensors:
            continue
        state: dict[str, Tensor] = {m: tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS}
        updates = float(step - int(refused[0]))
        state["step"] = torch.tensor(updates, dtype=torch.float32, device=parameter.device)
        student.optimizer.state[parameter] = state
