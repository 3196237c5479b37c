"""A thread that carries points from files to wherever `send` puts them, and never lets the training wait.

Tails the points files of one run, hands over whole batches in order, and remembers on disk after each the
last step that arrived (not the byte: a power failure may cut the file, and a resumed run grows it anew with
other lengths). A receiver that does not answer is tried again for ever, ever more slowly up to a cap, with
one warning an outage; what could not be sent before `close` stays in the files and is sent by the next run.
It is no `RetryPolicy`, since `close` ends its waits.
Knows no MLflow: `tracking` gives it the `send`.

Invariant: every point is sent at least once, and again only when the process died between sending and
remembering: `send` has to be idempotent for the same (name, step, time, value), as MLflow's log_batch is.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minilm.orchestrator.stage.metrics_file import Point, read_metrics
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.text import one_line

logger = logging.getLogger(__name__)


class Uploader:
    """Sends every point of `files` that is new since `state_path` was written; `start` it, `close` it.

    files: points files, existing or not yet. send: takes a list of points that hold at most `batch_metrics`
    numbers together (more only if a single point does), raises if they may not have arrived.
    """

    def __init__(
        self,
        files: Sequence[Path],
        send: Callable[[list[Point]], None],
        state_path: Path,
        *,
        batch_metrics: int = 1000,
        poll_seconds: float = 2.0,
        first_retry_seconds: float = 1.0,
        last_retry_seconds: float = 60.0,
    ) -> None:
        self.num_sent = 0  # points handed over by this uploader
        self.num_failures = 0  # calls of `send` that raised
        self._files = list(files)
        self._send = send
        self._state_path = state_path
        self._batch_metrics = batch_metrics
        self._poll_seconds = poll_seconds
        self._first_retry_seconds = first_retry_seconds
        self._last_retry_seconds = last_retry_seconds
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._away = False
        self._thread = threading.Thread(target=self._run, name=f"upload-{state_path.stem}", daemon=True)
        self._offsets = {file.name: 0 for file in self._files}
        self._last_steps = _load(state_path, self._files)

    def start(self) -> "Uploader":
        self._thread.start()
        return self

    def close(self, timeout_seconds: float = 30.0) -> int:
        """Sends what is left, for at most this long; returns how many points remain, with a warning."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds)  # a call that hangs is abandoned: the thread is a daemon
        left = sum(len(points) for points in self._unsent_points())
        if left:
            logger.warning(
                "%d points could not be sent; they stay in %s and the next run of this directory sends them",
                left,
                self._state_path.parent,
            )
        return left

    def drain(self) -> None:
        """Sends everything in the caller's thread, without `start`; raises what `send` raises."""
        for file in self._files:
            while self._send_next(file):
                pass

    def _run(self) -> None:
        delay = self._first_retry_seconds
        while True:
            closing = self._closing.is_set()  # asked before looking at the files: no earlier point is missed
            try:
                found = any([self._send_next(file) for file in self._files])
            except Exception as error:  # whatever it is: a thread that dies here loses points without a word
                self.num_failures += 1
                if not self._away:
                    self._away = True
                    logger.warning(
                        "points could not be sent to tracking; they wait in %s and are sent when it takes them (%s)",
                        self._state_path.parent,
                        one_line(error),
                    )
                if closing and time.monotonic() + delay > self._deadline:
                    return
                if closing:
                    time.sleep(delay)
                    if time.monotonic() > self._deadline:  # a busy machine has slept for longer
                        return
                else:
                    self._closing.wait(delay)
                just_closed = not closing and self._closing.is_set()
                delay = self._first_retry_seconds if just_closed else min(2 * delay, self._last_retry_seconds)
                continue
            delay = self._first_retry_seconds
            if found and self._away:
                self._away = False
                logger.warning("tracking takes points again")
            if closing and (not found or time.monotonic() > self._deadline):
                return
            if not found:
                self._closing.wait(self._poll_seconds)

    def _send_next(self, file: Path) -> bool:
        """Sends the next piece of one file, in batches; False if there is nothing new in it."""
        offset, last_step = self._offsets[file.name], self._last_steps[file.name]
        points, end = read_metrics(file, offset)
        for batch in _batches(_newer(points, last_step), self._batch_metrics):
            self._send(batch)
            self.num_sent += len(batch)
            self._last_steps[file.name] = batch[-1].step
            write_json(self._state_path, self._last_steps, durable=False)  # an old one costs a resend
        self._offsets[file.name] = end
        return end != offset

    def _unsent_points(self) -> list[list[Point]]:
        unsent = []
        for file in self._files:
            offset, last_step = self._offsets[file.name], self._last_steps[file.name]
            while True:
                points, end = read_metrics(file, offset)
                unsent.append(_newer(points, last_step))
                if end == offset:
                    break
                offset = end
        return unsent


def _load(path: Path, files: Sequence[Path]) -> dict[str, int]:
    """File name -> last step sent, -1 for none; a state that can't be read means: send everything again."""
    try:
        known = {name: int(step) for name, step in (read_json(path) or {}).items()}
    except (ValueError, TypeError, AttributeError):
        logger.warning("%s is damaged: sending every point again", path)
        known = {}
    return {file.name: known.get(file.name, -1) for file in files}


def _newer(points: list[Point], last_step: int) -> list[Point]:
    """Points behind the last step, each step once (two workers may have written for a moment)."""
    newer = []
    for point in points:
        if point.step > last_step:
            newer.append(point)
            last_step = point.step
    return newer


def _batches(points: list[Point], batch_metrics: int) -> list[list[Point]]:
    batches: list[list[Point]] = []
    room = 0
    for point in points:
        if not batches or len(point.metrics) > room:
            batches.append([])
            room = batch_metrics
        batches[-1].append(point)
        room -= len(point.metrics)
    return batches
