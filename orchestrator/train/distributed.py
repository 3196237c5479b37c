"""Rank, world size and device from torchrun's environment variables, and sums over ranks.

Ray Train sets the same variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so
neither this file nor the loop knows who started it. Small host values (row counts, a stop request) travel through a
gloo group on the CPU, so reading them never waits for the device. A rank that fails closes its connections, so that
the others end at once instead of after the process group's timeout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minilm.orchestrator.errors import UserError

PEER_TIMEOUT = timedelta(seconds=300)


def own_rank() -> int:
    """This process's rank, 0 outside a process group."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class World:
    """The ranks that compute a stage together. control: the gloo group for host values, None for a single rank."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def all_reduce_host(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks of a few host numbers, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def all_reduce_integers(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums over ranks of a few host integers below 2^63, exactly."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def merge(self, parts: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on the CPU of which each rank has filled in its own part, the rest zeros: no
        element is rounded."""
        if self.size > 1:
            dist.all_reduce(parts, group=self.control)
        return parts

    def broadcast(self, values: Sequence[int]) -> list[int]:
        """Rank 0's integers, on every rank; the other ranks give equally many, of any value."""
        return self.all_reduce_integers(values if self.is_rank_zero else [0] * len(values))

    def all_reduce(self, values: torch.Tensor) -> None:
        """Sum a tensor on the device over ranks, in place; the device waits, the host does not."""
        if self.size > 1:
            dist.all_reduce(values)


def pick_device(device: str, local_rank: int) -> torch.device:
    """The device for "cpu", "cuda" or "auto", which takes the GPU of this local rank where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "compute.device is cuda, but this machine has no usable CUDA device; "
            "use --set compute.device=cpu (or auto), or run on a GPU node"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


@contextmanager
def join_world(device: str, threads: int | None, timeout: timedelta = PEER_TIMEOUT) -> Iterator[World]:
    """The world of this process; creates the process group unless there is one, and then also destroys it.

    threads: CPU threads of each worker; None divides the visible cores among the workers of this node. timeout: how
    long a sum waits for the other workers.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    picked = pick_device(device, local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    ours = size > 1 and not dist.is_initialized()
    if ours:
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    control = None
    if size > 1:
        on_cpu = dist.get_backend() == "gloo"
        control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    failed = True
    try:
        yield World(rank, size, picked, control)
        failed = False
    finally:
        if ours or (failed and size > 1):
            dist.destroy_process_group()
