"""The state of a stage between two steps, on disk: whole or absent, verified when read.

A checkpoint is a folder `step-000000120` with, for each student, its weights and optimiser moments as safetensors
and a `checkpoint.json` that names the step, the job's digest, the data's fingerprint, the code's version, the SHA-256
of every file and of itself, and `Facts`. Where it lies, and how it is committed in one operation, is the store's affair
(`checkpoint_store`); the last `keep` stay, and every n-th step's. The teacher is never in it, and no random-generator
state either: every seed is a function of the step. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.patience import one_line
from orchestrator.checkpoint_store import META, CheckpointStore, open_store, step_of
from orchestrator.errors import InfrastructureError, UserError
from orchestrator.files import sha256_json, write_json
from orchestrator.provenance import code_version
from orchestrator.tensorfile import write_tensors

if TYPE_CHECKING:  # the driver imports this, and no modelling code
    from orchestrator.step import StudentState

log = logging.getLogger(__name__)

FORMAT = 4
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
    precision: float32 or bfloat16.
    """

    ledger: dict[str, Any]
    threads: int
    parts: int
    precision: str

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Facts:
        return cls(meta["ledger"], meta["threads"], meta["parts"], meta["precision"])


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
    store: CheckpointStore,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    identity: Identity,
    facts: Facts,
    *,
    keep: int,
    keep_every: int | None = None,
    guard: Callable[[], None] = lambda: None,
) -> str:
    """Write the state after `step` updates; drop all but the newest `keep` and every `keep_every`-th step's.

    `parts`: see `capture`; on the CPU. `guard()` is called last before the commit and may raise to prevent it.
    Returns the checkpoint's name. Raises `OSError` as the storage does, `InfrastructureError` for a remote store, and
    leaves nothing that looks like a checkpoint behind then.
    """
    for name in store.names():
        if step_of(name) == step:
            return name
    with store.staged(step) as folder:
        hashes = {
            f"{stem}.safetensors": write_tensors(folder / f"{stem}.safetensors", tensors)
            for stem, tensors in parts.items()
        }
        meta = {
            "format": FORMAT,
            "step": step,
            "job": identity.job,
            "data": identity.data,
            "code": code_version(),
            "sha256": hashes,
            **asdict(facts),
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
    identity: Identity,
) -> tuple[int, Facts] | None:
    """Load the newest sound checkpoint into `models` and `students`; its step and facts, or None where there is none.

    For the one process that writes to `store`: what killed saves left is removed, and a damaged checkpoint is
    passed over with a warning, in favour of the one before, and set aside, so that its step can be saved again.
    Storage that fails to answer (ESTALE, EIO, EMFILE, EACCES, a server's 500) is no damage: its error is raised.
    Raises `UserError` when a checkpoint belongs to another recipe or data set, or when checkpoints exist and none is
    sound.
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
            damaged[name] = one_line(error)[:200]
            continue
        check_identity(f"{store.where}/{name}", meta, identity)
        if changes := changed_code(meta["code"]):
            log.warning("goes on with other code than %s was made by: %s", name, changes)
        for other in damaged:
            store.set_aside(other)
        load(meta, tensors, models, students)
        return int(meta["step"]), Facts.of(meta)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {store.where} is sound ({found[-1]}: {damaged[found[-1]]}); "
            f"restore one from a backup, go on with the version that wrote them, or delete them to start again"
        )
    return None


def changed_code(before: Mapping[str, str]) -> str:
    """What `code_version` says now and what it said before, in words; empty when nothing has changed."""
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
) -> Facts:
    """Load the checkpoint that the main rank has chosen. Raises what `read` raises, and `FileNotFoundError` where this
    process's view of the store is older than that rank's; a retry may cure that."""
    name = next((name for name in reversed(store.names()) if step_of(name) == step), None)
    if name is None:
        raise FileNotFoundError(
            f"the checkpoint of step {step}, which the main rank goes on from, is not in {store.where} as this worker "
            f"sees it; every node must see the same storage"
        )
    with store.opened(name) as folder:
        meta, tensors = read(folder)
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


def read_meta(place: str) -> dict[str, Any]:
    """What the `checkpoint.json` of one checkpoint, a folder or URL, says. Raises `UserError` when that is none of
    this version."""
    above, _, name = place.rstrip("/").rpartition("/")
    try:
        store = open_store(above, Path(tempfile.gettempdir()))
        return parse_meta(store.read_meta(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {place} cannot be read ({error}); give a folder step-… of a stage's checkpoints"
        ) from error


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """With the SHA-256 of all the rest: a bit flipped in a step, a seed or a digest would be believed otherwise."""
    return meta | {"seal": sha256_json({key: value for key, value in meta.items() if key != "seal"})}


def parse_meta(text: bytes) -> dict[str, Any]:
    """A `checkpoint.json`, its seal checked. Raises ValueError on damage, and where another version wrote it."""
    meta = json.loads(text)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        given = meta.get("format") if isinstance(meta, dict) else None
        raise ValueError(f"its {META} has format {given}, this version reads {FORMAT}")
    if sealed(meta) != meta:
        raise ValueError(f"{META} does not have the SHA-256 that it records")
    return meta


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A checkpoint's metadata and tensors by file name, every hash checked. Raises ValueError on damage."""
    meta = parse_meta((path / META).read_bytes())
    tensors = {}
    for name, expected in meta["sha256"].items():
        if sha256_file(path / name) != expected:
            raise ValueError(f"{name} does not have the SHA-256 that checkpoint.json records")
        tensors[name] = load_file(path / name)
    return meta, tensors


def check_newest(store: CheckpointStore, identity: Identity) -> None:
    """Raise `UserError` when the newest checkpoint belongs to another recipe or data set; damage is for later."""
    for name in store.names()[-1:]:
        with suppress(*DAMAGE):
            check_identity(f"{store.where}/{name}", parse_meta(store.read_meta(name)), identity)


def check_identity(where: str, meta: dict[str, Any], identity: Identity) -> None:
    for what, given, expected in (
        ("recipe", meta["job"], identity.job),
        ("data set", meta["data"], identity.data),
    ):
        if given != expected:
            raise UserError(
                f"checkpoint {where} belongs to another {what} ({given[:12]}, this run has {expected[:12]}); "
                f"use another --workdir or compute.checkpoints, or delete the stage's checkpoints to train it again"
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
