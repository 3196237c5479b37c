"""Exceptions that end a worker because of another worker or of the cluster."""

from __future__ import annotations


class PeerFailed(Exception):
    """Another rank failed and reports its own error; this rank only ends."""


class Evicted(Exception):
    """These workers are about to be replaced. The state is saved, and the new ones resume from it."""
