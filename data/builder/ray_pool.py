"""A build's tasks on a Ray cluster instead of this machine's processes; the only file of data/ that imports Ray.

Every node must see the build's folder under the same path (NFS, Lustre, …): tasks read and write files there, and a
node that does not see it is named. Ray runs a task again when its node is lost; every task is safe to run twice.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minilm.data.builder.local_pool import Task
from minilm.data.errors import DataError

_TICK_SECONDS = 0.5
_IN_FLIGHT_PER_CORE = 2


def run_tasks_on_ray(tasks: Sequence[Task], tick: Callable[[], None]) -> Iterator[tuple[int, Any]]:
    """As `local_pool.run_tasks`, one core a task, on the cluster that this process is connected to or that
    RAY_ADDRESS names. Tasks under way tell nothing. Leaving the iterator cancels what is under way."""
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            raise DataError("no Ray cluster is running; start one, or set RAY_ADDRESS to its head") from error
    remote = ray.remote(num_cpus=1, max_retries=3)(_run)
    limit = max(1, _IN_FLIGHT_PER_CORE * int(ray.cluster_resources().get("CPU", 1)))
    waiting: dict[Any, int] = {}
    left = iter(enumerate(tasks))
    try:
        while True:
            for index, (name, arguments) in left:
                waiting[remote.remote(name, arguments)] = index
                if len(waiting) >= limit:
                    break
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), timeout=_TICK_SECONDS)
            if not done:
                tick()
            for reference in done:
                index = waiting.pop(reference)
                yield index, _result(ray.get(reference))
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _result(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise DataError(answer["error"])
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    return answer["result"]


def _run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """On a node: one task; errors that a user can mend travel as text."""
    import os
    import socket

    from minilm.data.builder.tasks import TASKS

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = arguments["folder"]
    if not (Path(folder) / "plan.json").exists():
        return {
            "error": f"node {socket.gethostname()} does not see {folder!r}; build on a cluster needs an output folder "
            "that all its nodes share"
        }
    try:
        return {"result": TASKS[name](**arguments)}
    except DataError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror, error.filename]}
