"""Processes as values that name one for good, on any machine, and how to end them.

The system gives process numbers out again, and they mean something on one machine only; a `Process` therefore carries
its machine and its start time too. Linux only, because it reads /proc.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

END_SECONDS = 10  # what the kernel may need to free the memory of a killed process


@dataclass(frozen=True)
class Process:
    """machine: see `this_machine`. started: in clock ticks since that machine's boot."""

    host: str
    machine: str
    pid: int
    started: int

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), this_machine(), os.getpid(), started(os.getpid()) or 0)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Does it run on this machine? Only then do `is_gone` and `kill` mean anything."""
        return self.machine == this_machine()

    def is_gone(self) -> bool:
        """Has it ended? Its number may belong to another process by now."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process, which /proc may hide
            return started(self.pid) not in (None, self.started)
        return started(self.pid) != self.started

    def kill(self) -> bool:
        """Send SIGKILL, which ends a stopped process too. False when it has already ended."""
        if not self.is_here or self.is_gone():
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return True


def this_machine() -> str:
    """A text that is equal only where process numbers mean the same: one boot of one kernel, one PID namespace.

    Containers on a host differ in the latter.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def started(pid: int) -> int | None:
    """When process `pid` of this machine started, in clock ticks since boot; None when it has ended."""
    fields = status(pid)
    return int(fields[19]) if fields else None


def status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, beginning with the state; none when the process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")  # any bytes are a name
    except (FileNotFoundError, ProcessLookupError):
        return []
    fields = stat.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


def family(root: int) -> dict[int, list[str]]:
    """Process `root` and its descendants by number, each with its `status`; those that have ended are left out."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    everyone = {pid: fields for pid in numbers if (fields := status(pid))}
    found = {root}
    while more := {pid for pid, fields in everyone.items() if int(fields[1]) in found} - found:
        found |= more
    return {pid: everyone[pid] for pid in sorted(found) if pid in everyone}


def descendants(root: int | None = None) -> list[Process]:
    """The descendants of process `root` of this machine (default: of this process)."""
    here = Process.this()
    root = here.pid if root is None else root
    below = family(root).items()
    return [replace(here, pid=pid, started=int(fields[19])) for pid, fields in below if pid != root]


def end_all(processes: Iterable[Process]) -> None:
    """Kill `processes` and wait until they are gone, because until then they keep files and ports open."""
    killed = [process for process in processes if process.kill()]
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and not all(process.is_gone() for process in killed):
        time.sleep(0.01)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of `pids` that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
