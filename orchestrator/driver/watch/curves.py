"""The curves of a run as its files tell them, read on from where the last look ended, and drawn in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import Point, read_metrics

LEVELS, ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
NOT_FINITE = "!"


@dataclass
class Curves:
    """Of one stage: the loss by student, and all points of its held-out file. `read` takes in what is new."""

    folder: StageFolder
    loss: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[Point] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=lambda: [0, 0])

    def read(self) -> None:
        """Raises `OSError` where storage does not answer."""
        files = (self.folder.step_metrics, self.folder.heldout_metrics)
        for i, file in enumerate(files):
            size = file.stat().st_size if file.exists() else 0
            if size < self._offsets[i]:  # the stage is done again
                self.loss, self.held_out, self._offsets = {}, [], [0, 0]
        for i, file in enumerate(files):
            while True:
                points, end = read_metrics(file, self._offsets[i])
                if end == self._offsets[i]:
                    break
                self._offsets[i] = end
                self._take(points, is_held_out=i == 1)

    def _take(self, points: Sequence[Point], *, is_held_out: bool) -> None:
        if is_held_out:
            self.held_out += points
            return
        for point in points:
            for key, value in point.metrics.items():
                student, _, name = key.rpartition("/")
                if name == "loss" and student:
                    self.loss.setdefault(student, []).append(value)


def sparkline(values: Sequence[float], width: int, levels: str = LEVELS) -> str:
    """The curve in at most `width` characters, each the mean of as many values; `!` where none of them is finite."""
    columns = min(width, len(values))
    means = []
    for i in range(columns):
        part = values[i * len(values) // columns : (i + 1) * len(values) // columns]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(
        levels[round((mean - low) * scale)] if math.isfinite(mean) else NOT_FINITE for mean in means
    )
