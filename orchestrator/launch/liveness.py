"""The supervision of silent workers by the driver: it says so, kills a stopped one, and gives up in the end.

A worker that hangs ends itself and leaves its stacks (`worker.watchdog`); a process that is stopped as a whole, or a
machine that is away, can't. Silence is counted on this process's clock, from the last heartbeat that differed from the
one before. Which rank is stopped is no matter: the others hang with it, so their own watchdogs or this one end
a worker, and Ray replaces the whole group, the stopped one included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import InfrastructureError, Stopped
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.system.timer import Timer
from minilm.orchestrator.worker.watchdog import LONG

GRACE_SECONDS = 10.0  # for the worker's own watchdog, which leaves its stacks
SHOWN_SECONDS = 15.0  # of silence, before it is worth a word
LOOK_SECONDS = 5.0  # between two looks at what a cluster has


class Heartbeats:
    """The signs of life of the rank 0 of one attempt."""

    def __init__(self, spec: StageSpec, clock: Callable[[], float] = time.monotonic):
        self.path, self.attempt, self.clock = StageFolder(Path(spec.folder)).heartbeat, spec.attempt, clock
        self.newest: dict[str, Any] | None = None
        self.since = clock()

    def poll(self) -> None:
        """Read the heartbeat file; older attempts and half-written files are ignored."""
        try:
            beat = read_json(self.path)
        except (OSError, ValueError):  # a shared file system, between two of its versions
            return
        if beat is not None and beat.get("attempt") == self.attempt and beat != self.newest:
            self.newest, self.since = beat, self.clock()

    @property
    def silent(self) -> float:
        """Seconds since the last sign of life."""
        return self.clock() - self.since


class Supervisor:
    """To be called again and again while workers run.

    `kill(process)` kills a worker on whatever node, False if it had ended; `lacking()` says what a cluster has not got
    for the run's fewest workers, "" if nothing; `say` prints a line that stays. Raises `InfrastructureError` when
    nothing can be done any more, `Stopped` when a stop is requested and nobody is there to hear of it.
    """

    def __init__(
        self,
        spec: StageSpec,
        beats: Heartbeats,
        *,
        wait_seconds: float,
        kill: Callable[[Process], bool],
        lacking: Callable[[], str],
        say: Callable[[str], None],
    ):
        self.spec, self.beats, self.wait_seconds = spec, beats, wait_seconds
        self.kill, self.lacking, self.say = kill, lacking, say
        self.allowed, self.judged = 0.0, ""
        self.lacks, self.lacks_since = "", 0.0
        self.look_due = Timer(LOOK_SECONDS, at_once=True)
        self._begin_silence()

    def __call__(self, stop_requested: bool) -> str:
        """What is worth showing about the workers' silence, "" while there is none."""
        silent = self.beats.silent
        if silent < SHOWN_SECONDS:
            self._begin_silence()
            if not (stop_requested and self.beats.newest is None):
                return ""
        if stop_requested and (self.beats.newest is None or self.lacks):
            raise Stopped(
                f"stage {self.spec.stage} is stopped while it waited for workers; the same command goes on"
            )
        self._look_at_cluster()
        if self.lacks:
            waited = self.beats.clock() - self.lacks_since
            if waited > self.wait_seconds:
                raise InfrastructureError(
                    f"stage {self.spec.stage}: {self.lacks}; compute.wait_seconds is {self.wait_seconds:g}; add nodes "
                    f"or lower compute.workers: the same command goes on from the last checkpoint"
                )
            return f"waiting for the cluster: {self.lacks} ({waited:.0f} of {self.wait_seconds:g} s)"
        if silent > self.allowed:
            self._act(silent)
        return f"last heartbeat {silent:.0f} s ago" if self.beats.newest else ""

    def _begin_silence(self) -> None:
        beat = self.beats.newest
        ordinary = beat is not None and beat["doing"] == "training"
        self.allowed = self.spec.runtime.stall_seconds * (1 if ordinary else LONG) + GRACE_SECONDS
        self.lacks, self.judged = "", ""

    def _look_at_cluster(self) -> None:
        if self.look_due():
            before = self.lacks
            try:
                self.lacks = self.lacking()
            except InfrastructureError as error:  # its head may come back
                self.lacks = str(error)
            if self.lacks and not before:
                self.lacks_since = self.beats.clock()

    def _act(self, silent: float) -> None:
        """The silence has lasted longer than the worker may be silent."""
        beat = self.beats.newest
        if self.judged or beat is None:
            raise InfrastructureError(
                f"stage {self.spec.stage}: no worker has given a sign of life for {silent:.0f} s; look at worker-*.log "
                f"in {self.spec.folder}; the same command goes on from the last checkpoint"
            )
        process = Process(**beat["process"])
        if self.kill(process):
            self.say(
                f"stage {self.spec.stage}: {process} has made no step for {silent:.0f} s and was killed; another one "
                f"goes on from the last checkpoint"
            )
        self.judged = str(process)
        self.allowed = (
            silent + self.spec.runtime.stall_seconds * LONG
        )  # for whoever comes in its place to start
