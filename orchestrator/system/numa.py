"""The processor cores that this process may use, by NUMA node: memory that lies with another node's cores is slow.

A machine that does not tell, as under macOS, counts as one node.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

NODES = Path("/sys/devices/system/node")


def allowed_cores() -> set[int]:
    """Those of this thread's affinity, or all where there is none."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def numa_nodes() -> list[set[int]]:
    """The allowed cores of each node that has any, in the order of the nodes' numbers; at least one node."""
    allowed, nodes = allowed_cores(), []
    with suppress(OSError, ValueError):
        for file in sorted(NODES.glob("node*/cpulist"), key=lambda file: int(file.parent.name[4:])):
            if cores := allowed & cores_of(file.read_text()):
                nodes.append(cores)
    return nodes if set().union(*nodes) == allowed else [allowed]


def cores_of(text: str) -> set[int]:
    """A list as Linux writes it: "0-3,8" -> {0, 1, 2, 3, 8}. Raises `ValueError`."""
    cores: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def keep_to_own_cores(threads: int) -> None:
    """Bind this thread, and those that it starts from now on, to the nodes of its worker's place among those on this
    machine, which torchrun and Ray Train tell. threads: of each worker."""
    rank, size = (
        int(os.environ.get(name, value)) for name, value in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if cores := own_cores(rank, size, threads):
        os.sched_setaffinity(0, cores)
        log.info("keeps to the %d cores of its NUMA node", len(cores))


def own_cores(rank: int, size: int, threads: int) -> set[int] | None:
    """The cores of the node, or the nodes, for worker `rank` of `size` on this machine, each with so many `threads`.

    None where all cores are as good: with one worker or one node, where nodes and workers do not go into each other,
    and where a node has not a core for each thread.
    """
    nodes = numa_nodes()
    if size == 1 or len(nodes) == 1 or max(size, len(nodes)) % min(size, len(nodes)):
        return None
    width = max(1, len(nodes) // size)  # nodes of a worker
    shares = [set().union(*nodes[at : at + width]) for at in range(0, len(nodes), width)]
    workers = size // len(shares)  # of a share
    if min(map(len, shares)) < workers * threads:
        return None
    return shares[rank // workers]
