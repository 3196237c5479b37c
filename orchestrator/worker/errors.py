"""How a worker ends when another one, or the cluster, makes it."""

from __future__ import annotations


class PeerFailed(Exception):
    """Another rank has an error and reports it; this one has only to end."""


class Evicted(Exception):
    """These workers are about to be replaced: the state is saved, and others go on."""
