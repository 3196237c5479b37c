"""A metrics file: the logged metrics of a stage, one JSON line for each logged step, in the work directory.

The training process appends and never waits for a reader. Readers (the MLflow uploader, the plots, a terminal) tail
the file. Knows neither MLflow nor torch.

Invariant: steps in a file strictly increase and a line is whole or absent. A resumed run replays steps that
are already there; they are not written again, so no step is doubled. None is lost with the process: the line
is in the kernel before `append` returns.

    {"step": 120, "time_ms": 1767225600000, "metrics": {"small/loss": 1.25, "learning_rate": 0.0004}}

JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back. Points of the held-out evaluation go to a file of their own: a step can have one of each.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

logger = logging.getLogger(__name__)

_TAIL_BYTES = 64 * 1024  # far more than one line; the last whole line is looked for in this much


class Point(NamedTuple):
    """The numbers of one step.

    step: optimiser step. time_ms: Unix time in milliseconds at which it was first logged.
    metrics: name -> value, names such as "small/loss" or "rows_per_second"; values may be NaN or infinite.
    """

    step: int
    time_ms: int
    metrics: dict[str, float]


class MetricsFile:
    """Appends points to a file; opening it cuts off a last line that a dead process left unfinished."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.last_step: int | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = 0
        self._look_at_end()

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Writes one point; False, and nothing written, if the file has this step or a later one already."""
        if os.fstat(self._file).st_size != self._size:  # a replaced worker that still lives wrote too
            self._look_at_end()
        if self.last_step is not None and step <= self.last_step:
            return False
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        record = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": values}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):  # the disk filled up in the middle of the line
            os.ftruncate(self._file, self._size)
            text = f"only {written} of {len(line)} bytes of a point fit; free some disk space"
            raise OSError(errno.ENOSPC, text, str(self.path))
        self._size += len(line)
        self.last_step = step
        return True

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look_at_end(self) -> None:
        """Cuts a torn last line off and learns the last step."""
        size = os.fstat(self._file).st_size
        start = max(0, size - _TAIL_BYTES)
        tail = os.pread(self._file, size - start, start)
        whole = tail.rfind(b"\n") + 1
        self._size = start + whole
        if self._size != size:
            logger.warning("%s: cut off an unfinished last line of %d bytes", self.path, size - self._size)
            os.ftruncate(self._file, self._size)
        points = [point for point in map(_parse, tail[:whole].splitlines()) if point is not None]
        if points:
            self.last_step = points[-1].step


def read_metrics(path: Path, offset: int = 0, limit_bytes: int = 1 << 20) -> tuple[list[Point], int]:
    """The points whose lines start at `offset` and are complete, and the offset to go on from.

    Reads about `limit_bytes` at most, so call again until no point comes. A file that does not exist yet has
    no points. A file shorter than the offset lost its end (power failure) and is read from its beginning:
    whoever must not see a step twice remembers the last step too. A line that is no point is skipped with a
    warning.
    """
    try:
        with path.open("rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                logger.warning("%s is shorter than what was read of it before: reading it again", path)
                offset = 0
            file.seek(offset)
            chunk = file.read(limit_bytes) + file.readline()
    except FileNotFoundError:
        return [], offset
    chunk = chunk[: chunk.rfind(b"\n") + 1]
    points = []
    for line in chunk.splitlines():
        point = _parse(line)
        if point is None:
            logger.warning("%s: skipped a damaged line of %d bytes", path, len(line))
        else:
            points.append(point)
    return points, offset + len(chunk)


def read_all_metrics(path: Path) -> list[Point]:
    """Every point of a file in order of its steps, each step once."""
    points: list[Point] = []
    offset = 0
    while True:
        new, end = read_metrics(path, offset)
        for point in new:
            if not points or point.step > points[-1].step:
                points.append(point)
        if end == offset:
            return points
        offset = end


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _parse(line: bytes) -> Point | None:
    try:
        record = json.loads(line)
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}
        return Point(int(record["step"]), int(record["time_ms"]), metrics)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
