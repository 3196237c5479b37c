"""Detects a crash loop: counts the attempts in a row that died at the same step, in two small files.

`reached` holds the step that is being computed. It is rewritten in place before each step, which takes microseconds;
the kernel has it then, so it survives the process. `attempts.json` is written when an attempt begins its loop: the
step at which the last attempt died, how many in a row died there, and how many have begun in all. A death at another
step starts the count again, so a machine that comes and goes is no crash loop. Attempts that never reach their loop are
counted apart, by rank and by their error's text, in `failed-starts-RANK.json`. Nothing here is fsynced: a file that a
power failure emptied or cut means that nothing was counted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minilm.orchestrator.system.files import read_json, write_json

MAX_FAILURES = 3
WIDTH = 20
ATTEMPTS = "attempts.json"
NONE_BEGUN = {"running": False, "step": -1, "failures": 0, "starts": 0}


class CrashLoopGuard:
    """Counts the attempts of the stage in `folder`. Rank 0 alone has one."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._record = folder / ATTEMPTS
        self._starts = starts(folder)
        self._reached = os.open(folder / "reached", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def begin(self, first: int) -> int | None:
        """Begin an attempt at step `first`. Returns the step at which the last three attempts died, None to go on.

        The count starts again once a step was returned: whoever changes something and runs again gets new attempts.
        """
        record = _read(self._record, NONE_BEGUN)
        step, failures = record["step"], record["failures"]
        if record["running"]:
            died_at = reached(self._folder)
            step, failures = died_at, failures + 1 if died_at == step else 1
        if failures >= MAX_FAILURES:
            self._write(running=False, step=-1, failures=0)
            return int(step)
        self.reach(first)
        self._starts += 1
        self._write(running=True, step=step, failures=failures)
        return None

    def reach(self, step: int) -> None:
        """Record that step `step` is about to be computed."""
        os.pwrite(self._reached, b"%*d" % (WIDTH, step), 0)

    def end(self) -> None:
        """End an attempt in good order: done, stopped on request, or with an error that names its cause."""
        self._write(running=False, step=-1, failures=0)

    def close(self) -> None:
        os.close(self._reached)

    def _write(self, *, running: bool, step: int, failures: int) -> None:
        record = {"running": running, "step": step, "failures": failures, "starts": self._starts}
        write_json(self._record, record, durable=False)


def starts(folder: Path) -> int:
    """How many attempts of the stage in `folder` have begun their loop."""
    return int(_read(folder / ATTEMPTS, NONE_BEGUN)["starts"])


def reached(folder: Path) -> int:
    """The step that the stage in `folder` is computing, or was computing when it ended; -1 before its first step."""
    try:
        return int((folder / "reached").read_bytes()[:WIDTH])
    except (FileNotFoundError, ValueError):
        return -1


def count_start_failure(folder: Path, rank: int, text: str) -> int:
    """Record that this rank failed with the error `text` before its loop; returns how many times in a row it did."""
    record = _read(_starts(folder, rank), {"text": "", "count": 0})
    count = record["count"] + 1 if record["text"] == text else 1
    write_json(_starts(folder, rank), {"text": text, "count": count % MAX_FAILURES}, durable=False)
    return int(count)


def forget_start_failures(folder: Path, rank: int) -> None:
    """Forget the failures of this rank, which has reached its loop."""
    _starts(folder, rank).unlink(missing_ok=True)


def _read(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        record = read_json(path)
    except ValueError:
        return default
    return default | record if isinstance(record, dict) and record.keys() <= default.keys() else default


def _starts(folder: Path, rank: int) -> Path:
    return folder / f"failed-starts-{rank}.json"
