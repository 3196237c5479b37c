"""A process that another one, perhaps on another machine, can name without mistaking it for a later one.

Process numbers are given again and mean something on one machine only, so a `Process` carries what tells them apart.
Reads /proc, so it is for Linux.
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

END_SECONDS = 10  # of the kernel, to take the memory of a killed process


@dataclass(frozen=True)
class Process:
    """machine: equal only where process numbers mean the same. started: in clock ticks since the machine's boot."""

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
        """Is it one of this machine, where `is_gone` and `kill` can be asked for?"""
        return self.machine == this_machine()

    def is_gone(self) -> bool:
        """Has it ended, though its number may be another's now?"""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's, of whom /proc may tell nothing
            return started(self.pid) not in (None, self.started)
        return started(self.pid) != self.started

    def kill(self) -> bool:
        """SIGKILL, which ends a stopped process too. False when it has ended before."""
        if not self.is_here or self.is_gone():
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return True


def this_machine() -> str:
    """One boot of one kernel and one namespace of process numbers; containers on a host differ in the latter."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def started(pid: int) -> int | None:
    """When process `pid` of this machine started, in clock ticks since boot; None when it has ended."""
    fields = status(pid)
    return int(fields[19]) if fields else None


def status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, from the state on; none when the process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")  # any bytes are a name
    except (FileNotFoundError, ProcessLookupError):
        return []
    fields = stat.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


def family(root: int) -> dict[int, list[str]]:
    """Process `root`, its children, theirs and so on, each with its `status`; those that have ended are left out."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    everyone = {pid: fields for pid in numbers if (fields := status(pid))}
    found = {root}
    while more := {pid for pid, fields in everyone.items() if int(fields[1]) in found} - found:
        found |= more
    return {pid: everyone[pid] for pid in sorted(found) if pid in everyone}


def descendants(root: int | None = None) -> list[Process]:
    """Of process `root` of this machine (default: this one)."""
    here = Process.this()
    root = here.pid if root is None else root
    below = family(root).items()
    return [replace(here, pid=pid, started=int(fields[19])) for pid, fields in below if pid != root]


def end_all(processes: Iterable[Process]) -> None:
    """SIGKILL them and wait until they are gone: till then they have their files open and their ports."""
    killed = [process for process in processes if process.kill()]
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and not all(process.is_gone() for process in killed):
        time.sleep(0.01)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
