"""A checkpoint's meta file: its hashes, what it says of the run, and whether it may be resumed from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.checkpoint.store import META, CheckpointStore
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import sha256_json

if TYPE_CHECKING:  # the driver imports this, and no modelling code
    pass


FORMAT = 4


DAMAGE = (ValueError, KeyError, SafetensorError, FileNotFoundError)  # ValueError: JSON that is none, too


@dataclass(frozen=True)
class Fingerprints:
    """What a checkpoint belongs to: the stage's digest and the data's fingerprint."""

    stage: str
    data: str


@dataclass(frozen=True)
class ResumeState:
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
    def of(cls, meta: Mapping[str, Any]) -> ResumeState:
        return cls(meta["ledger"], meta["threads"], meta["parts"], meta["precision"])


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def check_newest(store: CheckpointStore, fingerprints: Fingerprints) -> None:
    """Raise `UserError` when the newest checkpoint belongs to another recipe or data set; damage is for later."""
    for name in store.names()[-1:]:
        with suppress(*DAMAGE):
            check_fingerprints(f"{store.where}/{name}", parse_meta(store.read_meta(name)), fingerprints)


def check_fingerprints(where: str, meta: dict[str, Any], fingerprints: Fingerprints) -> None:
    for what, given, expected in (
        ("recipe", meta["job"], fingerprints.stage),
        ("data set", meta["data"], fingerprints.data),
    ):
        if given != expected:
            raise UserError(
                f"checkpoint {where} belongs to another {what} ({given[:12]}, this run has {expected[:12]}); "
                f"use another --workdir or compute.checkpoints, or delete the stage's checkpoints to train it again"
            )
