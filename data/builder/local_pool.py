"""A few worker processes that run named functions of builder.tasks: started clean, spoken to in JSON
lines.

Why not multiprocessing: its spawn imports the caller's main module again (a script without a guard starts
itself), and its queues leave semaphores in shared memory after a crash. A worker here is `python -c`, reads
tasks from stdin, writes results to stdout, and ends the moment its parent is gone, also in the middle of a
task. No pickles: arguments and results are JSON. Every task must be safe to run twice.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from minilm.data.builder.tasks import TASKS
from minilm.data.errors import DataError
from minilm.data.sources.progress import ProgressListener, listening

Task = tuple[str, dict[str, Any]]

_TICK_SECONDS = 0.5

_START = "import sys; sys.path[:] = {path!r}; from minilm.data.builder.local_pool import serve; serve()"


def run_tasks(
    tasks: Sequence[Task], processes: int, under_way: dict[int, ProgressListener], tick: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """Run every task; yields (index, result) as they end.

    In between `tick` is called every half second, in the caller's thread; `under_way` then says what the tasks under
    way have told (data.telling). The first error stops all and is raised here, and one of `tick` too. Leaving the
    iterator, by whatever way, ends every worker.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:

        def heard(index: int, told: ProgressListener) -> None:
            under_way[index] = told
            tick()

        with _serial_tokenizers():
            for index, (name, arguments) in enumerate(tasks):
                with listening(partial(heard, index)):
                    result = _function(name)(**arguments)
                under_way.pop(index, None)
                yield index, result
        return
    workers: SimpleQueue[_Worker] = SimpleQueue()
    started = [_Worker() for _ in range(processes)]
    for worker in started:
        workers.put(worker)
    pool = ThreadPoolExecutor(processes, thread_name_prefix="minilm-build")

    def run(index: int) -> tuple[int, Any]:
        worker = workers.get()
        try:
            return index, worker.call(*tasks[index], partial(under_way.__setitem__, index))
        finally:
            workers.put(worker)

    try:
        waiting: set[Future[tuple[int, Any]]] = {pool.submit(run, index) for index in range(len(tasks))}
        while waiting:
            done, waiting = wait(waiting, timeout=_TICK_SECONDS, return_when=FIRST_COMPLETED)
            if not done:
                tick()
            for future in done:
                index, result = future.result()
                under_way.pop(index, None)
                yield index, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.stop()
        pool.shutdown(wait=True)


@contextlib.contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """The tokenizers library warns and starts threads after forks unless told not to; restored afterwards."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _function(name: str) -> Callable[..., Any]:

    found: Callable[..., Any] = TASKS[name]
    return found


class WorkerEnded(DataError):
    """A worker process ended by itself or was killed; what it had finished is kept."""


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self) -> None:
        root = str(Path(__file__).absolute().parents[3])  # the folder that holds `minilm`
        path = [root, *(entry for entry in sys.path if entry and entry != root)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

    def call(self, name: str, arguments: dict[str, Any], heard: Callable[[ProgressListener], None]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        while (line := self._process.stdout.readline()) and "told" in (answer := json.loads(line)):
            heard(answer["told"])
        if not line:
            code = self._process.wait()
            raise WorkerEnded(
                f"a build process ended (code {code}) while it ran {name}; if memory ran out use fewer "
                "processes, "
                "then run the same command again: finished pieces are kept"
            )
        if "error" in answer:
            raise DataError(answer["error"])
        if "os_error" in answer:
            raise OSError(*answer["os_error"])
        if "defect" in answer:
            raise RuntimeError(f"in a build process:\n{answer['defect']}")
        return answer["result"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def serve() -> None:
    """The worker's side: tasks from stdin, answers, one a line, to what was stdout; prints go to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)  # the parent is gone

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        name, arguments = json.loads(lines.get())
        answer: dict[str, Any]
        try:
            with listening(lambda told: send({"told": told})):
                answer = {"result": _function(name)(**arguments)}
        except DataError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"os_error": [error.errno, error.strerror, error.filename]}
        except Exception:
            answer = {"defect": traceback.format_exc()}
        send(answer)
