"""What a stage tells about itself: points of steps and of held-out rows, and the heartbeat. The main rank writes.

Readers are elsewhere: the terminal follows the heartbeat, tracking and pictures the points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import MetricsFile
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.processes import Process
from minilm.orchestrator.system.timer import Timer

HEARTBEAT_SECONDS = 1.0


class MetricLogger:
    """Every rank keeps one, so that all take the same path; `writes` only on the main rank."""

    def __init__(
        self,
        spec: StageSpec,
        *,
        writes: bool,
        workers: int,
        seq_len: int,
        guard: Callable[[], None] = lambda: None,
    ):
        """`guard()` is called before each write and may raise to prevent it."""
        self.spec, self.workers, self.seq_len, self.guard = spec, workers, seq_len, guard
        self.folder, self.process = StageFolder(Path(spec.folder)), Process.this()
        self.points = MetricsFile(self.folder.points) if writes else None
        self.heldout_metrics = MetricsFile(self.folder.heldout_metrics) if writes else None
        self.beat_due = Timer(HEARTBEAT_SECONDS, at_once=True)
        self.doing = ""
        self.metrics: dict[str, float] = {}
        self.restart(0)

    def restart(self, step: int) -> None:
        """Speeds are measured from here on."""
        self.since, self.since_step, self.waited = time.monotonic(), step, 0.0

    @contextmanager
    def waiting_for_rows(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """A point: `metrics`, and the speed since the last one. `input_wait_share`: of the time, spent on waiting
        for rows."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        rows_per_second = (step - self.since_step) * self.spec.batch / seconds
        self.metrics = metrics | {
            "rows_per_second": rows_per_second,
            "tokens_per_second": rows_per_second * self.seq_len,
            "input_wait_share": self.waited / seconds,
        }
        self.restart(step)
        if self.points:
            self.guard()
            self.points.append(step, self.metrics)

    def heldout(self, step: int, divergence: dict[str, dict[str, float]]) -> None:
        """A point of the held-out rows, by student and term. The time it took does not count as training."""
        self.restart(step)
        if self.heldout_metrics:
            self.guard()
            self.heldout_metrics.append(
                step, {f"{s}/heldout/{t}": v for s, terms in divergence.items() for t, v in terms.items()}
            )

    def beat(self, doing: str, step: int, *, force: bool = False) -> None:
        changed, self.doing = (
            doing != self.doing,
            doing,
        )  # told at once: what is done decides how long it may take
        if self.points and (self.beat_due() or force or changed):
            self.guard()
            beat = {
                "attempt": self.spec.attempt,
                "doing": doing,
                "step": step,
                "time": time.time(),
                "pid": self.process.pid,
                "process": asdict(self.process),
                "workers": self.workers,
                "metrics": self.metrics,
            }
            write_json(self.folder.heartbeat, beat, durable=False)

    def close(self) -> None:
        for file in (self.points, self.heldout_metrics):
            if file:
                file.close()
