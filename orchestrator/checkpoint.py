"""The state of a stage between two steps, on disk: whole or absent, verified when read.

A checkpoint is a folder `step-000000120/` with, for each student, its weights and optimiser moments as safetensors
and a `checkpoint.json` that names the step, the job's digest, the data's fingerprint and the SHA-256 of every file.
It is written under a temporary name, fsynced and renamed; the last `keep` stay. The teacher is never in it, and no
random-generator state either: every seed is a function of the step. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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

FORMAT = 1
NAME = re.compile(r"step-(\d{9})")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: the job's digest and the data's fingerprint."""

    job: str
    data: str


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path,
    step: int,
    models: dict[str, dict[str, Tensor]],
    students: list[StudentState],
    identity: Identity,
    *,
    keep: int,
) -> Path:
    """Write the state after `step` updates and drop all but the newest `keep` checkpoints.

    `models`: for each student its full `state_dict` (trained or not), by name.
    """
    final = folder / f"step-{step:09d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        hashes = {}
        for student in students:
            parts = {"model": models[student.name], "optimizer": optimizer_tensors(student)}
            for part, tensors in parts.items():
                path = temporary / f"{student.name}.{part}.safetensors"
                hashes[path.name] = write_tensors(path, {k: v.detach().cpu() for k, v in tensors.items()})
        write_json(
            temporary / "checkpoint.json",
            {"format": FORMAT, "step": step, "job": identity.job, "data": identity.data, "sha256": hashes},
        )
        fsync_folder(temporary)
        temporary.rename(final)
        fsync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))


def restore_newest(
    folder: Path, models: Mapping[str, torch.nn.Module], students: list[StudentState], identity: Identity
) -> int | None:
    """Load the newest sound checkpoint into `models` and `students`; returns its step, or None where there is none.

    A damaged checkpoint is passed over with a warning, in favour of the one before. Raises `UserError` when a
    checkpoint belongs to another recipe or data set, or when checkpoints exist and none is sound.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            meta, tensors = read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, error)
            continue
        check_identity(path, meta, identity)
        for student in students:
            models[student.name].load_state_dict(tensors[f"{student.name}.model.safetensors"])
            load_optimizer(student, tensors[f"{student.name}.optimizer.safetensors"], meta["step"])
        return int(meta["step"])
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} is sound; restore one from a backup, "
            f"or delete the folder to start the stage again"
        )
    return None


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
    """Adam's two moments of every trained parameter, named `<moment>/<parameter>`; empty before the first update."""
    state = student.optimizer.state
    return {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in student.parameters.items()
        if parameter in state
        for moment in MOMENTS
    }


def load_optimizer(student: StudentState, tensors: dict[str, Tensor], step: int) -> None:
    """Put the moments back; every parameter has been updated once a step, so AdamW's own counter is `step`."""
    for name, parameter in student.parameters.items():
        if f"exp_avg/{name}" not in tensors:
            continue
        state: dict[str, Tensor] = {m: tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS}
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
        student.optimizer.state[parameter] = state
