"""The state of a stage between two steps, on disk: whole or absent, verified when read.

A checkpoint is a folder `step-000000120` with, for each student, its weights and optimiser moments as safetensors
and a `checkpoint.json` that names the step, the stage's digest, the data's fingerprint, the code's version, the SHA-256
of every file and of itself, and `ResumeState`. Where it lies, and how it is committed in one operation, is the
store's affair (`store`); the newest `keep` stay, and every n-th step's. It holds neither the teacher nor the state of
a random generator (every seed is a function of the step), and no pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minilm.orchestrator.checkpoint.format import (
    DAMAGE,
    FORMAT,
    Fingerprints,
    ResumeState,
    check_fingerprints,
    read,
    sealed,
)
from minilm.orchestrator.checkpoint.safetensors_file import write_tensors
from minilm.orchestrator.checkpoint.state import load
from minilm.orchestrator.checkpoint.store import META, CheckpointStore, step_of
from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.text import one_line
from minilm.orchestrator.system.versions import code_version

if TYPE_CHECKING:  # the driver imports this module, and no modelling code
    from minilm.orchestrator.train.step import StudentState

log = logging.getLogger(__name__)


def write(
    store: CheckpointStore,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    fingerprints: Fingerprints,
    state: ResumeState,
    *,
    keep: int,
    keep_every: int | None = None,
    guard: Callable[[], None] = lambda: None,
) -> str:
    """Write the state after `step` updates; drop all but the newest `keep` and every `keep_every`-th step's.

    tensors: by file stem as `capture` returns them, on the CPU. `guard()` is called last before the commit and may
    raise to prevent it. Returns the checkpoint's name. Raises `OSError` as the storage does, `InfrastructureError` for
    a remote store; nothing that looks like a checkpoint is left then.
    """
    for name in store.names():
        if step_of(name) == step:
            return name
    with store.staged(step) as folder:
        hashes = {
            f"{stem}.safetensors": write_tensors(folder / f"{stem}.safetensors", of_file)
            for stem, of_file in tensors.items()
        }
        meta = {
            "format": FORMAT,
            "step": step,
            "job": fingerprints.stage,
            "trunk": fingerprints.trunk_at(step),
            "data": fingerprints.data,
            "code": code_version(),
            "sha256": hashes,
            **asdict(state),
        }
        write_json(folder / META, sealed(meta))
        name = store.commit(folder, guard)
    try:
        for old in store.names()[:-keep]:
            if keep_every is None or step_of(old) % keep_every:
                store.remove(old)
        store.sweep()
    except InfrastructureError as error:  # the new one is safe, and the next save tries again
        log.warning("older checkpoints stay for now: %s", error)
    return name


def restore_newest(
    store: CheckpointStore,
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
    fingerprints: Fingerprints,
) -> tuple[int, ResumeState] | None:
    """Load the newest sound checkpoint into `models` and `students`.

    Returns its step and `ResumeState`, None where there is no checkpoint. To be called by the one process that writes
    to `store`: what killed saves left is removed, and a damaged checkpoint is passed over with a warning, in favour of
    the one before, and set aside, so that its step can be saved again. Storage that fails to answer (ESTALE, EIO,
    EMFILE, EACCES, a server's 500) is no damage: its error is raised. Raises `UserError` when a checkpoint belongs to
    another recipe or data set, or when checkpoints exist and none is sound.
    """
    store.sweep()
    damaged: dict[str, str] = {}
    found = store.names()
    for name in reversed(found):
        try:
            with store.opened(name) as folder:
                meta, tensors = read(folder)
            if meta["step"] != step_of(name):  # a copy by hand: its step would never be saved
                raise ValueError(f"it is of step {meta['step']}")
        except DAMAGE as error:
            log.warning(
                "checkpoint %s/%s is damaged (%s): falling back to the one before", store.where, name, error
            )
            damaged[name] = one_line(error)
            continue
        check_fingerprints(f"{store.where}/{name}", meta, fingerprints)
        if changes := changed_code(meta["code"]):
            log.warning("goes on with other code than %s was made by: %s", name, changes)
        for other in damaged:
            store.set_aside(other)
        load(meta, tensors, models, students)
        return int(meta["step"]), ResumeState.of(meta)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {store.where} is sound ({found[-1]}: {damaged[found[-1]]}); "
            f"restore one from a backup, go on with the version that wrote them, or delete them to start again"
        )
    return None


def changed_code(before: Mapping[str, str]) -> str:
    """The versions that differ between `before` and now, as text; empty when none does."""
    now = code_version()
    return ", ".join(
        f"{name} {before.get(name, 'unknown')} → {now.get(name, 'unknown')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def restore_step(
    store: CheckpointStore,
    step: int,
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
) -> ResumeState:
    """Load the checkpoint that rank zero has chosen. Raises what `read` raises, and `FileNotFoundError` where this
    process's view of the store is older than rank zero's; another attempt may cure that."""
    name = next((name for name in reversed(store.names()) if step_of(name) == step), None)
    if name is None:
        raise FileNotFoundError(
            f"the checkpoint of step {step}, which rank 0 resumes from, is not in {store.where} as this worker "
            f"sees it; every node must see the same storage"
        )
    with store.opened(name) as folder:
        meta, tensors = read(folder)
        load(meta, tensors, models, students)
    return ResumeState.of(meta)
