"""Exceptions that end a worker because of another worker, of the cluster, or of numbers that are not finite."""

from __future__ import annotations

from minilm.orchestrator.errors import UserError


class NotFinite(UserError):
    """A loss or gradient of step `step` (from 0) is not finite, and the run may not go on."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class PeerFailed(Exception):
    """Another rank failed and reports its own error; this rank only ends."""


class Evicted(Exception):
    """These workers are about to be replaced. The state is saved, and the new ones resume from it."""
