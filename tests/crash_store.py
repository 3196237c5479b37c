"""A process that is killed at every request of a save to object storage in turn; run by test_object_store.

usage: python -m tests.crash_store URL FOLDER

The server of s3_server does the killing. Credentials are in the environment.

Each round forks a child that starts as a run does, finds two sound checkpoints, and saves the next step, which removes
the older one. Prints what each child found and how it ended, as JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

import torch

from minilm.data.storage.retry import RetryPolicy
from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.format import read
from minilm.orchestrator.checkpoint.object_store import ObjectStore
from minilm.orchestrator.checkpoint.state import capture
from tests.test_checkpoint import FACTS, MINE, advance, make


def control(**order: object) -> None:
    """Arm the next kill, or none."""
    request = urllib.request.Request(
        f"{os.environ['AWS_ENDPOINT_URL']}/_kill", data=json.dumps(order).encode(), method="POST"
    )
    urllib.request.urlopen(request).close()


def child(url: str, folder: Path, at: int) -> None:
    """Start as a run does, tell what was found, and save the next step with a kill at request `at`."""
    store = ObjectStore(url, folder, retry=RetryPolicy(tries=1))
    rooms = len(list(folder.glob(".step-*")))
    models, states = make(9)
    found = checkpoint.restore_newest(store, models, states, MINE)
    names = store.names()
    for name in names:
        with store.opened(name) as path:
            read(path)
    left = [name for name in store._list() if name not in names]
    step = found[0] if found else 0
    told = {"step": step, "sound": found == (step, FACTS), "rooms": rooms, "left": left}
    print(json.dumps(told), flush=True)
    for number in (1, 2) if not found else (step + 1,):
        advance(states, number)
        if found:
            control(pid=os.getpid(), at=at)
        checkpoint.write(store, number, capture(models, states), MINE, FACTS, keep=2)
    control()


def main() -> None:
    """Rounds until a save needs fewer requests than the number that was to be struck; the last one is a mere start."""
    url, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    at = 0
    while True:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            child(url, folder, at)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        control()
        print(json.dumps({"at": at, "status": status}), flush=True)
        if at and status != -9:
            return
        at += 1


if __name__ == "__main__":
    main()
