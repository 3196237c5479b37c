"""WORKDIR/tracking.json: the MLflow runs of a work directory, and what MLflow has not been told yet.

Imports no MLflow, so that `minilm run` on a finished work directory learns in a millisecond whether something is
pending; `tracking.flush_pending` then sends it.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from minilm.orchestrator.system.files import read_json, write_json

STATE_FILE = "tracking.json"


@dataclass
class State:
    """What the file holds. A stage's run is found by the stage's name, the recipe's by ""."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # a tag of every run of this work directory
    experiment_id: str | None = None
    runs: dict[str, str] = field(default_factory=dict)  # run: its id in MLflow
    takes: dict[str, int] = field(default_factory=dict)  # run: how many it has had, where more than one
    sent: dict[str, list[str]] = field(
        default_factory=dict
    )  # stage: the metrics files that points were sent from
    notes: list[dict[str, Any]] = field(default_factory=list)  # pending, oldest first

    @classmethod
    def read(cls, path: Path) -> Self:
        """An absent file is a new state. Raises ValueError where the file is damaged."""
        values = read_json(path) or {}
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def forget_runs(self) -> None:
        """Begin anew at a server that does not have the runs; what is pending stays."""
        new = type(self)(notes=self.notes)
        for part in fields(self):
            setattr(self, part.name, getattr(new, part.name))


def has_pending(workdir: Path) -> bool:
    """True if something is left to send. False also where the file is damaged: nothing in it can be sent."""
    try:
        state = read_json(workdir / STATE_FILE)
    except ValueError:
        return False
    return isinstance(state, dict) and bool(state.get("notes"))
