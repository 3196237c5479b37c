"""The right to write in a work directory: one driver at a time has it, on whatever host, and the workers it started.

`WORKDIR/lease/` holds one file for each epoch; `000007.json` says which process took the seventh. Creating that file
takes the lease, because a name is created once, on a local disk as on a shared one. The new holder then removes the
files of earlier epochs, and starts to work only after that. A process that finds the file of its epoch gone has lost
the lease for good and stops writing: the driver ends with code 6, and in its workers `Fence.check` raises.

The holder touches its file every few seconds. It is dead when its process is gone, which only its own machine can
know; from another machine, when the file was not touched for `PATIENCE_SECONDS` on the challenger's clock. Clocks of
two hosts are never compared. A holder that ends in good order records that in the file, which stays: epochs only grow.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TextIO

from minilm.orchestrator.errors import LeaseHeld
from minilm.orchestrator.system.processes import Process

RENEW_SECONDS = 3.0
PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.25
ANSWER_SECONDS = 2.0
UNKNOWN = "a process that is just starting"
NAME = re.compile(r"\d{6,}\.json")


class Superseded(Exception):
    """A newer driver holds the lease of the work directory: this worker of an older one must not write any more."""

    exit_code = LeaseHeld.exit_code


class OwnedStore(Protocol):
    """A store outside the work directory that records which attempt may write to it."""

    where: str

    def owner(self) -> str | None:
        """The attempt that claimed the store last; None if nobody did."""
        ...


@dataclass(frozen=True)
class Fence:
    """Keeps a worker from writing after another run has taken over. `check` comes before each write.

    lease: the epoch file of the worker's driver, "" if no driver watches over it. store: where the writes go if that is
    outside the work directory; only `attempt` may write there. Without one, `check` costs one `open` of a file.
    """

    lease: str
    store: OwnedStore | None = None
    attempt: str = ""

    def check(self) -> None:
        """Raises `Superseded` if the driver has lost its lease, `LeaseHeld` if the store belongs to another attempt.

        A work directory that does not answer is asked again for `ANSWER_SECONDS`. After that an `OSError` without a
        number is raised, which is no refused write (`write_errors.writing`): another attempt may succeed. Raises what
        `store.owner` raises.
        """
        if self.lease and not still_held_with_retries(path := Path(self.lease)):
            raise Superseded(
                f"another run has taken {path.parent.parent} over: this worker ends without writing"
            )
        if self.store and (owner := self.store.owner()) not in (None, self.attempt):
            raise LeaseHeld(
                f"another run ({owner}) has taken over the checkpoints in {self.store.where}; let one of the two go "
                f"on, or give this one another compute.checkpoints"
            )


class Lease:
    """One epoch, held by this process until `release`. `on_lost()` is called once it has been lost."""

    def __init__(self, path: Path, holder: Process, on_lost: Callable[[Path], None]):
        self.path, self.holder, self.on_lost = path, holder, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="minilm-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Called before a write that a newer holder must not see. Calls `on_lost` if the lease is lost.

        Storage that does not answer is asked again as in `Fence.check`.
        """
        if not still_held_with_retries(self.path):
            self.on_lost(self.path)

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with (
            suppress(OSError),
            self.path.open("r+", encoding="utf-8") as file,
        ):  # a lost lease is not created again
            write(file, self.holder, released=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            now = time.time_ns()
            try:
                os.utime(self.path, ns=(now, now))
            except FileNotFoundError:
                self.on_lost(self.path)
                return
            except OSError:  # storage that does not answer us does not answer a challenger either
                continue


def take(folder: Path, *, on_lost: Callable[[Path], None] | None = None) -> Lease:
    """Take the next epoch of `folder` for this process.

    Raises `LeaseHeld` if another process holds the lease and lives; waits up to `PATIENCE_SECONDS` to find that out.
    `on_lost` ends this process by default, with exit code 6.
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
        path.unlink(missing_ok=True)  # this process was so slow that later epochs have begun
    for old in epochs(folder)[:-1]:
        old.unlink(missing_ok=True)
    return Lease(path, holder, on_lost or end_process)


def still_held(path: Path) -> bool:
    """True if the epoch of this file may still write. Raises `OSError` if storage does not answer."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # on NFS an open asks the server; a stat may not
    except FileNotFoundError:
        return False
    return True


def still_held_with_retries(path: Path) -> bool:
    """`still_held`, asked until storage answers or `ANSWER_SECONDS` are over."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return still_held(path)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"{path} does not say who may write ({error.strerror})") from error
        time.sleep(POLL_SECONDS)


def outlast(path: Path) -> None:
    """Wait until the holder of `path` has released it or is dead. Raises `LeaseHeld` if it lives."""
    first, announced = touched(path), False
    began = time.monotonic()
    while True:
        waited = (
            time.monotonic() - began
        )  # measured before reading, so that a long sleep is followed by one more read
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
        if not announced:
            wait = f"waiting {PATIENCE_SECONDS:.0f} s for a sign of life of it"
            print(f"{holder or UNKNOWN} had {path.parent.parent}: {wait}", file=sys.stderr, flush=True)
            announced = True
        time.sleep(POLL_SECONDS)


def held(path: Path, holder: Process | None, age: float) -> LeaseHeld:
    """The error that names the holder. age: seconds since its last sign of life."""
    who = f"{holder or UNKNOWN}, last sign of life {max(age, 0.0):.0f} s ago"
    return LeaseHeld(
        f"another run works in {path.parent.parent} ({who}); wait for it, stop it, or give another --workdir"
    )


def end_process(path: Path) -> None:
    """Say on standard error that the lease in `path` is lost, and end this process at once with exit code 6."""
    text = f"minilm: error: another run has taken {path.parent.parent} over; this one ends without writing\n"
    with suppress(OSError):
        os.write(2, text.encode())
    os._exit(LeaseHeld.exit_code)


def epochs(folder: Path) -> list[Path]:
    """The epochs' files, oldest first."""
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), key=epoch_of)


def epoch_of(path: Path) -> int:
    return int(path.stem)


@dataclass(frozen=True)
class Holder:
    """Who had the lease last, as it can be seen from here.

    state: alive, ended (in good order), killed, or silent (of another machine, without a sign of life for
    `PATIENCE_SECONDS`). age: seconds since its last sign of life, by this machine's clock.
    """

    process: Process | None
    state: str
    age: float


def last_holder(folder: Path) -> Holder | None:
    """The holder of the newest epoch; None where nobody ever took the lease. Changes nothing."""
    newest = epochs(folder)[-1] if folder.is_dir() and epochs(folder) else None
    seen = touched(newest) if newest else None
    if newest is None or seen is None:
        return None
    process, released = read(newest)
    age = max((time.time_ns() - seen) / 1e9, 0.0)
    if released:
        state = "ended"
    elif process and process.is_here:
        state = "killed" if process.is_gone() else "alive"
    else:
        state = "alive" if age < PATIENCE_SECONDS else "silent"
    return Holder(process, state, age)


def touched(path: Path) -> int | None:
    """Modification time of the file in nanoseconds of its holder's clock; None if it is gone."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def read(path: Path) -> tuple[Process | None, bool]:
    """The holder of this epoch (None while the file is being written), and whether it has released the lease."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Process(**record["holder"]), record["released"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None, False


def write(file: TextIO, holder: Process, *, released: bool) -> None:
    file.write(json.dumps({"holder": asdict(holder), "released": released}))
    file.truncate()
