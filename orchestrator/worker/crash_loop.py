"""Is a stage getting anywhere? Counts the attempts that died at the same step, in two small files.

`reached` holds the step that is being computed, rewritten in place before each step (microseconds; in the kernel,
so it survives the process). `attempts.json` is written when an attempt begins its loop: where the last one died, and
how many in a row died there. CrashLoopGuard that never reach their loop count for nothing; those that died at different
steps, such as by a machine that comes and goes, start the count again. Nothing here is fsynced: a file that a power
failure has emptied or cut means that nothing was counted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minilm.orchestrator.system.files import read_json, write_json

MAX_FAILURES = 3
WIDTH = 20


class CrashLoopGuard:
    """Of the stage in `folder`; for the main rank."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._record = folder / "attempts.json"
        self._reached = os.open(folder / "reached", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def begin(self, first: int) -> int | None:
        """An attempt begins at step `first`. Returns the step at which the last three died, or None to go on.

        After an answer the count starts again: whoever changes something and runs again gets new attempts.
        """
        record = _read(self._record, {"running": False, "step": -1, "failures": 0})
        step, failures = record["step"], record["failures"]
        if record["running"]:
            died_at = reached(self._folder)
            step, failures = died_at, failures + 1 if died_at == step else 1
        if failures >= MAX_FAILURES:
            self._write(running=False, step=-1, failures=0)
            return int(step)
        self.reach(first)
        self._write(running=True, step=step, failures=failures)
        return None

    def reach(self, step: int) -> None:
        """Step `step` is about to be computed."""
        os.pwrite(self._reached, b"%*d" % (WIDTH, step), 0)

    def end(self) -> None:
        """The attempt ends in good order: done, stopped on request, or with an error that names its cause."""
        self._write(running=False, step=-1, failures=0)

    def close(self) -> None:
        os.close(self._reached)

    def _write(self, *, running: bool, step: int, failures: int) -> None:
        write_json(self._record, {"running": running, "step": step, "failures": failures}, durable=False)


def reached(folder: Path) -> int:
    """The step that the stage in `folder` computes, or was computing when it ended; -1 before its first one."""
    try:
        return int((folder / "reached").read_bytes()[:WIDTH])
    except (FileNotFoundError, ValueError):
        return -1


def count_start_failure(folder: Path, rank: int, text: str) -> int:
    """Note that an attempt of this rank ended with the error `text`; how many in a row did, none reaching its loop."""
    record = _read(_starts(folder, rank), {"text": "", "count": 0})
    count = record["count"] + 1 if record["text"] == text else 1
    write_json(_starts(folder, rank), {"text": text, "count": count % MAX_FAILURES}, durable=False)
    return int(count)


def forget_start_failures(folder: Path, rank: int) -> None:
    """This rank has reached its loop."""
    _starts(folder, rank).unlink(missing_ok=True)


def _read(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        record = read_json(path)
    except ValueError:
        return default
    return record if isinstance(record, dict) and record.keys() == default.keys() else default


def _starts(folder: Path, rank: int) -> Path:
    return folder / f"failed-starts-{rank}.json"
