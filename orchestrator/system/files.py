"""Small files of text and JSON, written whole or not at all, and the digest of a JSON value."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from minilm.data.format.files import NO_SPACE, write_whole
from minilm.orchestrator.errors import UserError


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text`, its folder made where it is missing; see `write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode(), durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n", durable=durable)


def read_json(path: Path) -> Any | None:
    """The value in `path`, or None where there is no such file (nor can be one)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_place(out: Path) -> None:
    """UserError unless a folder can be made at `out`, or the one that is there can be written."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{out} can't be a folder: {nearest} is a file; give another place")
    try:
        Path(tempfile.mkdtemp(dir=nearest)).rmdir()  # /proc looks writable to os.access
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(
            f"{out} can't be written: {nearest} takes no folder ({error.strerror}); give another place"
        ) from None


def sha256_json(value: Any) -> str:
    """The digest (hex) of plain values, in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
