"""What a person sees while a run works: one line that keeps moving. And what a program sees: JSON lines."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from minilm.data.builder.phases import BuildProgress
from minilm.data.builder.report import BuildReport
from minilm.orchestrator.errors import Stopped
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.system.text import duration

PLAIN_INTERVAL_SECONDS = 5.0
TICK_SECONDS, PLAIN_TICK_SECONDS = 1.0, 30.0


class StatusLine:
    """One status line: rewritten in place on a terminal, printed every few seconds elsewhere, not at all if `quiet`.

    While nothing new comes, the line counts the seconds itself. A terminal or pipe that has gone away ends the
    showing, never the run. `facts` are for programs (`JsonLines`).
    """

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False):
        self.out = out or sys.stderr
        self.quiet = quiet
        self.live = self.out.isatty()
        self.printed = 0.0
        self.last = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None
        self._text, self._since = "", 0.0

    def show(self, text: str, *, force: bool = False, **facts: Any) -> None:
        if self.quiet:
            return
        with self._lock:
            self._text, self._since = text, time.monotonic()
            if self.live:
                self._rewrite(text)
            elif text != self.last and (force or time.monotonic() - self.printed >= PLAIN_INTERVAL_SECONDS):
                self._print(text)
        if self._ticker is None:
            self._closed.clear()
            self._ticker = threading.Thread(target=self._tick, name="status-line", daemon=True)
            self._ticker.start()

    def say(self, text: str, *, event: str = "message", **facts: Any) -> None:
        """A line that stays."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line that stays, also if `quiet`."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the line: what is printed next starts on its own."""
        if self._ticker:
            self._closed.set()
            self._ticker.join()
            self._ticker = None
        if self.live and not self.quiet:
            self._write("\r\x1b[2K")

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            with self._lock:
                waited = time.monotonic() - self._since
                text = f"{self._text} ({duration(waited)})"
                if self.live and waited >= TICK_SECONDS:
                    self._rewrite(text)
                elif not self.live and min(waited, time.monotonic() - self.printed) >= PLAIN_TICK_SECONDS:
                    self._print(text)

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be taken back
        self._write(f"\r\x1b[2K{text[:width]}")

    def _print(self, text: str) -> None:
        self._write(f"{text}\n")
        self.printed, self.last = time.monotonic(), text

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            self.out.write(text)
            self.out.flush()


class JsonLines(StatusLine):
    """The same for programs: an object a line with `event`, `time` (Unix seconds), `text` and the facts.

    The events are progress, message, warning, built, learned, evaluated and result (docs/runs.md), and error, which
    the command itself prints.
    """

    def __init__(self, out: TextIO | None = None):
        super().__init__(out or sys.stdout)
        self.shown: tuple[Any, ...] = ()

    def show(self, text: str, *, force: bool = False, **facts: Any) -> None:
        what = facts.get("stage"), facts.get("doing", text)
        if force or what != self.shown or time.monotonic() - self.printed >= TICK_SECONDS:
            self.shown, self.printed = what, time.monotonic()
            self.emit("progress", text, **facts)

    def say(self, text: str, *, event: str = "message", **facts: Any) -> None:
        self.emit(event, text, **facts)

    def warn(self, text: str) -> None:
        self.emit("warning", text)

    def emit(self, event: str, text: str, **facts: Any) -> None:
        values = {"event": event, "time": round(time.time(), 3), "text": text, **facts}
        self._write(json.dumps(finite(values), ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with null in place of every number that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        facts = progress._asdict()
        line.show(describe_build(progress), doing="building", **facts)

    return report


def say_built(line: StatusLine, report: BuildReport) -> None:
    """What the build has found, once it is done."""
    line.say(f"the data set is built:\n{report.text()}", event="built", report=report.as_dict())


def doing_text(beat: dict[str, Any]) -> str:
    """`evaluating 3/16`, of a heartbeat."""
    done, total = beat.get("part") or (0, 0)
    return f"{beat['doing']} {done}/{total}" if total else str(beat["doing"])


def slowness_text(slowness: dict[str, float]) -> str:
    """Of a heartbeat: how much longer steps take than before, and whether other programs want the processors."""
    load, processors = slowness["load"], int(slowness["processors"])
    is_crowded = load > processors + 1
    why = (
        "other programs want them too"
        if is_crowded
        else "they are not crowded: look for a limit or throttling"
    )
    return (
        f"steps take {slowness['times']:.1f} times as long as before: the load is {load:.1f} on {processors}"
        f" processors, and {why}"
    )


def seconds_left(beat: dict[str, Any], steps: int, batch: int) -> float | None:
    """Of the steps that are left, without what is measured, saved and exported; None before the first step."""
    rows = beat["metrics"].get("rows_per_second")
    return None if rows is None else (steps - beat["step"]) * batch / max(rows, 1e-9)


class StageProgress:
    """Turns heartbeats into lines such as
    `[1/2] assistant  step 120/240  loss 0.812 (attention 0.41 value 0.40)  312 rows/s  40.0k tokens/s  1m02s left`."""

    def __init__(self, line: StatusLine, spec: StageSpec, prefix: str):
        self.line, self.spec, self.prefix = line, spec, prefix
        self.started = time.monotonic()
        self.told_slowness = False

    def show(self, beat: dict[str, Any] | None, silence: str = "") -> None:
        """`beat`: the newest heartbeat of this attempt, None before the first; `silence`: words about its age."""
        facts: dict[str, Any] = {"stage": self.spec.stage, "steps": self.spec.steps}
        if beat is None:
            text = f"{self.prefix}  starting workers ({duration(time.monotonic() - self.started)})"
            facts["doing"] = "starting"
        else:
            if (slowness := beat.get("slowness")) and not self.told_slowness:
                self.told_slowness = True
                self.line.say(f"{self.prefix}  {slowness_text(slowness)}")
            text = self.describe(beat)
            facts |= {key: beat.get(key) for key in ("doing", "part", "step", "workers", "metrics")}
            facts["steps"] = self.steps(beat)
            facts["seconds_left"] = self.seconds_left(beat)
        self.line.show(f"{text}  {silence}" if silence else text, **facts)

    def describe(self, beat: dict[str, Any]) -> str:
        spec, metrics = self.spec, beat["metrics"]
        parts = [self.prefix, f"step {beat['step']}/{self.open_end(beat)}{self.steps(beat)}"]
        if beat["doing"] != "training":
            parts.append(doing_text(beat))
        for student in spec.students:
            if f"{student.name}/loss" in metrics:
                label = f"{student.name} loss" if len(spec.students) > 1 else "loss"
                parts.append(
                    f"{label} {metrics[f'{student.name}/loss']:.3f} ({self.terms(student.name, metrics)})"
                )
        left = self.seconds_left(beat)
        if left is not None:
            parts += [
                f"{metrics['rows_per_second']:.0f} rows/s",
                f"{metrics['tokens_per_second'] / 1000:.1f}k tokens/s",
                f"{duration(left)} left",
            ]
        return "  ".join(parts)

    def steps(self, beat: dict[str, Any]) -> int:
        """Of the whole stage, as far as is known."""
        return int(beat.get("steps", self.spec.steps))

    def open_end(self, beat: dict[str, Any]) -> str:
        """`at most `, while nothing says that the stage is good enough before."""
        return "at most " if self.spec.until and self.steps(beat) == self.spec.steps else ""

    def seconds_left(self, beat: dict[str, Any]) -> float | None:
        return seconds_left(beat, self.steps(beat), self.spec.batch)

    @staticmethod
    def terms(student: str, metrics: dict[str, float]) -> str:
        """The objective's terms; their values by head are too many for a line."""
        others = {"loss", "gradient_norm", "skipped_steps"}
        own = {k.removeprefix(f"{student}/"): v for k, v in metrics.items() if k.startswith(f"{student}/")}
        return " ".join(f"{k} {v:.3f}" for k, v in own.items() if k not in others and "/" not in k)
