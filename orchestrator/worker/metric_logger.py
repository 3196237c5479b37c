"""Writes what a stage reports while it runs: metrics of steps and of held-out rows, and the heartbeat.

Rank 0 writes. The status line reads the heartbeat; tracking and plots read the metrics files.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import MetricsFile
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.system.machine_load import MachineLoad
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.system.timer import Timer

HEARTBEAT_SECONDS = 1.0
SLOW = 2.0  # as many times as long as the usual step, twice running, is worth a word


class MetricLogger:
    """Every rank has one, so that all ranks run the same code; only one with `writes` (rank 0) writes files.

    fence: checked before each write. The loop waits for it, so it should be one that asks the work directory alone.
    """

    def __init__(self, spec: StageSpec, *, writes: bool, workers: int, seq_len: int, fence: Fence):
        self.spec, self.workers, self.seq_len, self.fence = spec, workers, seq_len, fence
        self.folder, self.process = StageFolder(Path(spec.folder)), Process.this()
        self.step_metrics = MetricsFile(self.folder.step_metrics) if writes else None
        self.heldout_metrics = MetricsFile(self.folder.heldout_metrics) if writes else None
        self.system_metrics = MetricsFile(self.folder.system_metrics) if writes else None
        self.load = MachineLoad()
        self.heartbeat_timer = Timer(HEARTBEAT_SECONDS, at_once=True)
        self.doing = ""
        self.metrics: dict[str, float] = {}
        self.usual: deque[float] = deque(maxlen=99)  # seconds a step, of the last points that were not slow
        self.is_slow = False  # the last point
        self.slowness: dict[str, float] | None = None
        self.restart(0)

    def restart(self, step: int) -> None:
        """Measure speeds from here on; `step` updates are done."""
        self.since, self.since_step, self.waited = time.monotonic(), step, 0.0

    @contextmanager
    def waiting_for_rows(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for rows."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log `metrics` after `step` updates, with the speed and this machine's load since the last call.

        `input_wait_share` is the share of that time which was spent waiting for rows.
        """
        seconds = max(time.monotonic() - self.since, 1e-9)
        self.metrics = metrics | self.speed(step, seconds) | {"input_wait_share": self.waited / seconds}
        self.notice_slowness(seconds / max(step - self.since_step, 1))
        self.restart(step)
        if self.step_metrics:
            self.fence.check()
            self.step_metrics.append(step, self.metrics)
        if self.system_metrics:
            self.system_metrics.append(step, self.load.read())

    def notice_slowness(self, seconds: float) -> None:
        """Keep for the heartbeats the first time that two points running took `SLOW` times the usual seconds a step."""
        times = seconds / statistics.median(self.usual) if len(self.usual) > 2 else 0.0
        was_slow, self.is_slow = self.is_slow, times >= SLOW
        if not self.is_slow:
            self.usual.append(seconds)
        elif was_slow and self.slowness is None:
            self.slowness = {"times": times, **self.load.waiting()}

    def speed(self, step: int, seconds: float) -> dict[str, float]:
        rows_per_second = (step - self.since_step) * self.spec.batch / seconds
        return {"rows_per_second": rows_per_second, "tokens_per_second": rows_per_second * self.seq_len}

    def heldout(self, step: int, measured: dict[str, float]) -> None:
        """Log what the evaluators have measured. The time it took does not count as training."""
        self.restart(step)
        if self.heldout_metrics:
            self.fence.check()
            self.heldout_metrics.append(step, measured)

    def beat(
        self, doing: str, step: int, *, part: tuple[int, int] | None = None, force: bool = False
    ) -> None:
        """Write the heartbeat, at most once in `HEARTBEAT_SECONDS` unless `force` or `doing` is new.

        A new `doing` is written at once because the driver decides by it how long it may take. `part`: how many
        pieces of it are done, of how many. Before the first logged step the speed is that of the steps so far.
        """
        changed, self.doing = doing != self.doing, doing
        if self.step_metrics and (self.heartbeat_timer() or force or changed):
            self.fence.check()
            metrics = self.metrics
            if not metrics and step > self.since_step:
                metrics = self.speed(step, max(time.monotonic() - self.since, 1e-9))
            beat = {
                "attempt": self.spec.attempt,
                "doing": doing,
                "part": part,
                "step": step,
                "steps": self.spec.steps,
                "time": time.time(),
                "pid": self.process.pid,
                "process": asdict(self.process),
                "workers": self.workers,
                "metrics": metrics,
                "slowness": self.slowness,
            }
            write_json(self.folder.heartbeat, beat, durable=False)

    def close(self) -> None:
        for file in (self.step_metrics, self.heldout_metrics, self.system_metrics):
            if file:
                file.close()
