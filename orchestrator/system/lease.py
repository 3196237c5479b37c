"""Who may write in a work directory: one driver at a time, on whatever host, and the workers that it has started.

`WORKDIR/lease/` holds a file for each epoch: `000007.json` says which process has taken it. Making that file is
taking the lease, because a name is made once, on a local disk as on a shared one. The taker then removes the files of
the epochs before, and only then works. So whoever finds the file of its epoch gone has lost the lease for good, and
writes no more: the driver ends with code 6, its workers refuse to save (`still_held`).

A holder touches its file every few seconds. It is dead when its process is gone, which only its own machine can know;
from elsewhere, when its file has not been touched for `PATIENCE_SECONDS` on the challenger's clock. Clocks of two
hosts are never compared. A holder that ends in good order says so in the file, which stays: epochs only grow.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from minilm.orchestrator.errors import LeaseHeld
from minilm.orchestrator.system.processes import Process

RENEW_SECONDS = 3.0
PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 0.25
ANSWER_SECONDS = 2.0
UNKNOWN = "a process that is just starting"
NAME = re.compile(r"\d{6,}\.json")


class Superseded(Exception):
    """A newer driver has the work directory: this worker of an older one must not write any more."""

    exit_code = LeaseHeld.exit_code


class Lease:
    """One epoch, held by this process until `release`. `on_lost()` is called once it has been lost."""

    def __init__(self, path: Path, holder: Process, on_lost: Callable[[Path], None]):
        self.path, self.holder, self.on_lost = path, holder, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="minilm-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """To be called before a write that a newer holder must not see. Does not come back when the lease is lost.

        Storage that does not answer is asked again as in `check_writer`.
        """
        if not answered(self.path):
            self.on_lost(self.path)

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError), self.path.open("r+", encoding="utf-8") as file:  # never makes it anew
            write(file, self.holder, released=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            now = time.time_ns()
            try:
                os.utime(self.path, ns=(now, now))
            except FileNotFoundError:
                self.on_lost(self.path)
                return
            except OSError:  # storage that is away is away for a challenger too
                continue


def take(folder: Path, *, on_lost: Callable[[Path], None] | None = None) -> Lease:
    """The next epoch of `folder`, for this process.

    Raises `LeaseHeld` when another process has it and lives; waits where that can't be told at once. `on_lost` is by
    default the end of this process, with exit code 6.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = Process.this()
    while True:
        before = epochs(folder)
        if before:
            outlast(before[-1])
        path = folder / f"{epoch_of(before[-1]) + 1 if before else 1:06d}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                write(file, holder, released=False)
        except FileExistsError:  # another challenger was faster
            continue
        if epochs(folder)[-1] == path:
            break
        path.unlink(missing_ok=True)  # this one was so slow that later epochs have begun
    for old in epochs(folder)[:-1]:
        old.unlink(missing_ok=True)
    return Lease(path, holder, on_lost or end_process)


def still_held(path: Path) -> bool:
    """Is the epoch of this file still the one that may write? Raises `OSError` when storage does not answer."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # on NFS an open asks the server; a stat may not
    except FileNotFoundError:
        return False
    return True


def check_writer(lease: str) -> None:
    """Raises `Superseded` in a worker whose driver has lost the lease in this file; "" is no lease.

    Storage that does not answer is asked again for `ANSWER_SECONDS`. Then it is an `OSError` without a number: one
    that may pass, and no refused write (`storage.writing`).
    """
    if lease and not answered(Path(lease)):
        raise Superseded(
            f"another run has taken {Path(lease).parent.parent} over: this worker ends without writing"
        )


def answered(path: Path) -> bool:
    """`still_held`, asked until storage answers or `ANSWER_SECONDS` are over."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return still_held(path)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"{path} does not say who may write ({error.strerror})") from error
        time.sleep(LOOK_SECONDS)


def outlast(path: Path) -> None:
    """Return when the holder of `path` has released it or is dead. Raises `LeaseHeld` when it lives."""
    first, told = touched(path), False
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began  # taken before the look: after a long sleep it looks once more
        seen, (holder, released) = touched(path), read(path)
        if seen is None or released:
            return
        if holder and holder.is_here:
            if holder.is_gone():
                return
            raise held(path, holder, (time.time_ns() - seen) / 1e9)
        if seen != first:
            raise held(path, holder, 0.0)
        if waited >= PATIENCE_SECONDS:
            return
        if not told:
            wait = f"waiting {PATIENCE_SECONDS:.0f} s for a sign of life of it"
            print(f"{holder or UNKNOWN} had {path.parent.parent}: {wait}", file=sys.stderr, flush=True)
            told = True
        time.sleep(LOOK_SECONDS)


def held(path: Path, holder: Process | None, age: float) -> LeaseHeld:
    """age: seconds since the last sign of life."""
    who = f"{holder or UNKNOWN}, last sign of life {max(age, 0.0):.0f} s ago"
    return LeaseHeld(
        f"another run works in {path.parent.parent} ({who}); wait for it, stop it, or give another --workdir"
    )


def end_process(path: Path) -> None:
    text = f"minilm: error: another run has taken {path.parent.parent} over; this one ends without writing\n"
    with suppress(OSError):
        os.write(2, text.encode())
    os._exit(LeaseHeld.exit_code)


def epochs(folder: Path) -> list[Path]:
    """The epochs' files, oldest first."""
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), key=epoch_of)


def epoch_of(path: Path) -> int:
    return int(path.stem)


def touched(path: Path) -> int | None:
    """When the file was last touched, in its holder's nanoseconds; None when it is gone."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def read(path: Path) -> tuple[Process | None, bool]:
    """Who has taken this epoch (None while the file is being made), and whether it has given it back."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Process(**record["holder"]), record["released"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None, False


def write(file: TextIO, holder: Process, *, released: bool) -> None:
    file.write(json.dumps({"holder": asdict(holder), "released": released}))
    file.truncate()
