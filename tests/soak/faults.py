"""The fault schedule of a soak: which faults are injected into a run, and when. A pure function of a seed.

A fault is injected once the run has recovered from the one before and made steps for `pause` seconds. A `hasty` fault
comes `pause` seconds after the one before, so that faults fall into starts and recoveries too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

WEIGHTS = {
    "worker": 36,  # SIGKILL a training worker
    "driver": 16,  # SIGKILL `minilm run`, and run the same command again
    "damage": 10,  # damage the newest checkpoint, and SIGKILL all workers
    "node": 10,  # add a raylet, or SIGKILL one with its workers
    "tracking": 8,  # SIGKILL the MLflow server, and start it again later
    "stop": 6,  # SIGSTOP a worker: it neither works nor dies
    "full": 6,  # fill the disk of the work directory, and free it later
    "second-driver": 4,  # run the same command while the first still runs
    "cache": 4,  # SIGKILL all workers, and flip a bit of a cached shard
}
HASTY = ("worker", "driver")
HASTY_SHARE = 0.2
PAUSE_SECONDS = (0.5, 4.0)
DURATION_SECONDS = (4.0, 20.0)


class Fault(NamedTuple):
    """One fault.

    pause: seconds to wait before it (see the module). pick: in [0, 1), chooses the victim or the kind of damage.
    duration: seconds that the server is away or the disk is full.
    """

    number: int
    kind: str
    pause: float
    hasty: bool
    pick: float
    duration: float

    def text(self) -> str:
        when = "after the fault before" if self.hasty else "of steps"
        what = f"#{self.number} {self.kind}: {self.pause:.1f} s {when}"
        return f"{what}, pick {self.pick:.3f}, duration {self.duration:.1f} s"


def fault_schedule(seed: int, kinds: Sequence[str]) -> Iterator[Fault]:
    """The faults of one round, without end, drawn from `kinds` by `WEIGHTS`."""
    rng = random.Random(seed)
    weights = [WEIGHTS[kind] for kind in kinds]
    for number in count(1):
        kind = rng.choices(kinds, weights)[0]
        pause, duration = rng.uniform(*PAUSE_SECONDS), rng.uniform(*DURATION_SECONDS)
        pick, hasty = rng.random(), rng.random() < HASTY_SHARE
        yield Fault(number, kind, pause, hasty and kind in HASTY, pick, duration)
