"""Damages files as a failing disk does."""

from __future__ import annotations

import os
from pathlib import Path

from minilm.orchestrator.checkpoint.format import DAMAGE, read
from minilm.orchestrator.checkpoint.local_store import LocalStore


def damage_newest(checkpoints: Path, pick: float) -> str | None:
    """Damage the newest checkpoint if the one before it is sound. Returns what was damaged and how, or None."""
    found = [checkpoints / name for name in LocalStore(checkpoints).names()]
    try:
        read(found[-2])
        victims = sorted(path for path in found[-1].iterdir() if path.is_file())
        victim = victims[int(pick * 997) % len(victims)]
        how = ("a bit flipped", "cut short", "lost")[int(pick * 3)]
        if how == "lost":
            victim.unlink()
        elif how == "cut short":
            os.truncate(victim, victim.stat().st_size // 2)
        else:
            flip_bit(victim, pick)
        return f"{found[-1].name}/{victim.name} {how}"
    except (IndexError, *DAMAGE):  # there is none before it, or that one is damaged
        return None


def flip_bit(path: Path, pick: float) -> None:
    """Flip one bit of a file, at an offset chosen by `pick`."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        offset = int(pick * 99_991) % max(size, 1)
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
