"""Which checkpoint store a recipe's `compute.checkpoints` means."""

from __future__ import annotations

from pathlib import Path

from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.store import CheckpointStore
from minilm.orchestrator.stage.folder import CHECKPOINT_SCHEMES


def open_store(place: str | None, folder: Path) -> CheckpointStore:
    """The store at `place`, a URL or a folder; None means `folder`. Behind a URL, files are staged in `folder`.

    Raises `UserError` where the package for the URL is not installed.
    """
    scheme, _, path = (place or "").partition("://")
    if scheme in CHECKPOINT_SCHEMES:
        from minilm.orchestrator.checkpoint.object_store import ObjectStore

        return ObjectStore(str(place), folder)
    return LocalStore(Path(path or scheme or folder))
