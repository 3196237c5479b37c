"""Runs `minilm run` in a process of its own and watches its files: what it does, how fast, in how much memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.store import step_of
from minilm.orchestrator.driver.run_status import whole_json
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.processes import Process, descendants, end_all
from minilm.orchestrator.system.signals import StopRequest

POLL_SECONDS, END_SECONDS = 0.02, 60.0


@dataclass
class StageSeen:
    """workers: of its group. memory: bytes that the process of rank 0 held at most, where it ran on this machine.
    first_steps: by attempt, the first step that was heard of."""

    workers: int = 0
    memory: int = 0
    first_steps: dict[str, int] = field(default_factory=dict)


class Watcher:
    """Looks at the heartbeats of the stages in `folder`."""

    def __init__(self, folder: RunFolder, stages: Sequence[str]):
        self.folder, self.seen = folder, {stage: StageSeen() for stage in stages}

    def look(self) -> None:
        for stage, seen in self.seen.items():
            beat = None
            with suppress(OSError):
                beat = whole_json(self.folder.stage(stage).heartbeat)
            if beat is None:
                continue
            seen.workers = max(seen.workers, beat["workers"])
            seen.first_steps.setdefault(beat["attempt"], beat["step"])
            process = Process(**beat["process"])
            if process.is_here and not process.is_gone():
                with suppress(psutil.Error):
                    seen.memory = max(seen.memory, psutil.Process(process.pid).memory_info().rss)

    def newest_checkpoint(self) -> tuple[str, int] | None:
        """The stage and the step of the newest one."""
        for stage in reversed(self.seen):
            if names := LocalStore(self.folder.stage(stage).checkpoints).names():
                return stage, step_of(names[-1])
        return None


@dataclass
class Ended:
    """How a run ended: its exit code, None where it was killed; `stopped` before its end, because the time was up or
    somebody asked; `problems`, in its own words."""

    exit_code: int | None
    stopped: bool = False
    problems: list[str] = field(default_factory=list)


def play(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    watcher: Watcher,
    line: StatusLine,
    log: Path,
    *,
    stop: StopRequest,
    deadline: float,
    kill_when: Callable[[], bool] = lambda: False,
) -> Ended:
    """`minilm run` with `arguments`, until it ends by itself, `kill_when()` holds or `deadline` (monotonic) has come.

    A kill is that of all its processes on this machine. log: what it writes on standard error is appended there.
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "minilm", "run", *arguments, "--json"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # a Ctrl-C is ours, and passed on
        )
    problems: list[str] = []
    reader = threading.Thread(target=_read, args=(process, line, problems), daemon=True)
    reader.start()
    asked = 0.0
    try:
        while process.poll() is None:
            watcher.look()
            now = time.monotonic()
            if kill_when():
                return Ended(None)
            if not asked and (stop.requested or now > deadline):
                process.send_signal(signal.SIGTERM)
                asked = now
            elif asked and now > asked + END_SECONDS:
                break
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            below = descendants(process.pid)  # a cluster of its own, whose workers would go on for a while
            process.kill()
            end_all(below)
        process.wait()
        reader.join(timeout=END_SECONDS)
    return Ended(process.returncode, bool(asked), problems)


def _read(process: subprocess.Popen[bytes], line: StatusLine, problems: list[str]) -> None:
    """Show the run's own progress, and keep its errors."""
    assert process.stdout is not None
    for text in process.stdout:
        try:
            event: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        if event.get("event") == "progress":
            line.show(f"rehearsal  {event['text']}")
        problems += event.get("problems", ())
