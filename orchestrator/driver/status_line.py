"""What a person sees while a run works: one line that keeps moving, from rank 0's heartbeat."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from minilm.data.builder.phases import BuildProgress
from minilm.orchestrator.errors import Stopped
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.system.text import duration

PLAIN_INTERVAL_SECONDS = 5.0


class StatusLine:
    """One status line: rewritten in place on a terminal, printed every few seconds elsewhere.

    A terminal or pipe that has gone away ends the showing, never the run.
    """

    def __init__(self, out: TextIO | None = None):
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.printed = 0.0
        self.last = ""

    def show(self, text: str, *, force: bool = False) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be taken back
            self._write(f"\r\x1b[2K{text[:width]}")
        elif text != self.last and (force or time.monotonic() - self.printed >= PLAIN_INTERVAL_SECONDS):
            self._write(f"{text}\n")
            self.printed, self.last = time.monotonic(), text

    def say(self, text: str) -> None:
        """A line that stays."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the line: what is printed next starts on its own."""
        if self.live:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            self.out.write(text)
            self.out.flush()


def describe_build(progress: BuildProgress) -> str:
    """`building shards (tokenize)  45%  4,500 documents  210k tokens/s  4s left`."""
    left = "" if math.isnan(progress.seconds_left) else f"  {duration(progress.seconds_left)} left"
    speed = progress.tokens / max(progress.seconds, 1e-9) / 1000
    return (
        f"building shards ({progress.phase})  {progress.share:.0%}  {progress.documents:,} documents  "
        f"{speed:.0f}k tokens/s{left}"
    )


def build_reporter(line: StatusLine, stop: StopRequest) -> Callable[[BuildProgress], None]:
    """Shows the build, and ends it when a signal has come."""

    def report(progress: BuildProgress) -> None:
        if stop.requested:
            raise Stopped("stopped while building the data set; the same command goes on with it")
        line.show(describe_build(progress))

    return report


class StageProgress:
    """Turns heartbeats into lines such as
    `[1/2] assistant  step 120/240  loss 0.812 (attention 0.41 value 0.40)  312 rows/s  40.0k tokens/s  1m02s left`."""

    def __init__(self, line: StatusLine, spec: StageSpec, prefix: str):
        self.line, self.spec, self.prefix = line, spec, prefix
        self.started = time.monotonic()

    def show(self, beat: dict[str, Any] | None, silence: str = "") -> None:
        """`beat`: the newest heartbeat of this attempt, None before the first; `silence`: words about its age."""
        if beat is None:
            text = f"{self.prefix}  starting workers ({duration(time.monotonic() - self.started)})"
        else:
            text = self.describe(beat)
        self.line.show(f"{text}  {silence}" if silence else text)

    def describe(self, beat: dict[str, Any]) -> str:
        spec, metrics = self.spec, beat["metrics"]
        parts = [self.prefix, f"step {beat['step']}/{spec.steps}"]
        if beat["doing"] != "training":
            parts.append(beat["doing"])
        for student in spec.students:
            if f"{student.name}/loss" in metrics:
                label = f"{student.name} loss" if len(spec.students) > 1 else "loss"
                parts.append(
                    f"{label} {metrics[f'{student.name}/loss']:.3f} ({self.terms(student.name, metrics)})"
                )
        if "rows_per_second" in metrics:
            rows = metrics["rows_per_second"]
            left = (spec.steps - beat["step"]) * spec.batch / max(rows, 1e-9)
            parts += [
                f"{rows:.0f} rows/s",
                f"{metrics['tokens_per_second'] / 1000:.1f}k tokens/s",
                f"{duration(left)} left",
            ]
        return "  ".join(parts)

    @staticmethod
    def terms(student: str, metrics: dict[str, float]) -> str:
        """The objective's terms; their values by head are too many for a line."""
        others = {"loss", "gradient_norm", "skipped_steps"}
        own = {k.removeprefix(f"{student}/"): v for k, v in metrics.items() if k.startswith(f"{student}/")}
        return " ".join(f"{k} {v:.3f}" for k, v in own.items() if k not in others and "/" not in k)
