"""A checkpoint's meta file: its hashes, what it records of the run, and whether a run may resume from it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.checkpoint.store import META, CheckpointStore
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import sha256_json

FORMAT = 4
DAMAGE = (ValueError, KeyError, SafetensorError, FileNotFoundError)  # text that is no JSON is a ValueError


@dataclass(frozen=True)
class Fingerprints:
    """What a checkpoint belongs to: the stage's digest and the data's fingerprint.

    trunk: the digest of all that determines the first `stable_steps` steps, whatever comes after; "" where the rates
    depend on the end.
    """

    stage: str
    data: str
    trunk: str = ""
    stable_steps: int = 0

    @classmethod
    def of(cls, spec: StageSpec, data: str) -> Fingerprints:
        decay = spec.learning_rate.decay_steps or 0
        return cls(spec.digest, data, spec.trunk, spec.steps - decay)

    def trunk_at(self, step: int) -> str:
        return self.trunk if step <= self.stable_steps else ""


@dataclass(frozen=True)
class ResumeState:
    """What a run needs besides tensors and step to go on exactly.

    ledger: `digest` (hex, see `feed.ledger`) with the `seed` and `batch` that it can be recomputed from. threads: CPU
    threads of every worker. parts: the number of pieces that each micro-batch is cut into (2 after running out of
    memory). precision: float32 or bfloat16. points: those that the stage's `until` is decided from, by step.
    """

    ledger: dict[str, Any]
    threads: int
    parts: int
    precision: str
    points: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> ResumeState:
        return cls(meta["ledger"], meta["threads"], meta["parts"], meta["precision"], meta.get("points", {}))


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(place: str) -> dict[str, Any]:
    """The content of one checkpoint's `checkpoint.json`; `place` is its folder or URL. Raises `UserError` where there
    is none that this version reads."""
    above, _, name = place.rstrip("/").rpartition("/")
    try:
        store = open_store(above, Path(tempfile.gettempdir()))
        return parse_meta(store.read_meta(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {place} cannot be read ({error}); give a folder step-… of a stage's checkpoints"
        ) from error


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with the SHA-256 of all its other entries, so that a flipped bit in a step or a seed is noticed."""
    return meta | {"seal": sha256_json({key: value for key, value in meta.items() if key != "seal"})}


def parse_meta(text: bytes) -> dict[str, Any]:
    """Parse a `checkpoint.json` and check its seal. Raises ValueError on damage, and where another version wrote it."""
    meta = json.loads(text)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        given = meta.get("format") if isinstance(meta, dict) else None
        raise ValueError(f"its {META} has format {given}, this version reads {FORMAT}")
    if sealed(meta) != meta:
        raise ValueError(f"{META} does not have the SHA-256 that it records")
    return meta


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A checkpoint's metadata, and its tensors by file name, every hash checked. Raises one of `DAMAGE`."""
    meta = parse_meta((path / META).read_bytes())
    tensors = {}
    for name, expected in meta["sha256"].items():
        if sha256_file(path / name) != expected:
            raise ValueError(f"{name} does not have the SHA-256 that checkpoint.json records")
        tensors[name] = load_file(path / name)
    return meta, tensors


def check_newest(store: CheckpointStore, fingerprints: Fingerprints) -> None:
    """Raise `UserError` when the newest checkpoint belongs to another recipe or data set; damage is found later."""
    for name in store.names()[-1:]:
        with suppress(*DAMAGE):
            check_fingerprints(f"{store.where}/{name}", parse_meta(store.read_meta(name)), fingerprints)


def check_fingerprints(where: str, meta: dict[str, Any], fingerprints: Fingerprints) -> None:
    trunk = fingerprints.trunk_at(meta["step"])
    job = fingerprints.stage if trunk and meta.get("trunk") == trunk else meta["job"]
    for what, given, expected in (
        ("recipe", job, fingerprints.stage),
        ("data set", meta["data"], fingerprints.data),
    ):
        if given != expected:
            raise UserError(
                f"checkpoint {where} belongs to another {what} ({given[:12]}, this run has {expected[:12]}); "
                f"use another --workdir or compute.checkpoints, or delete the stage's checkpoints to train it again"
            )
