"""Ports that nobody else is given."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from minilm.orchestrator.errors import InfrastructureError


def free_port() -> int:
    """A port of loopback that stays free: nobody gets one of these, from the system or from Ray, without asking."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise InfrastructureError("no port of loopback is free")
