"""What a soak does to a run, and when: an endless list of strikes that is a pure function of a seed.

A strike waits until the run has recovered from the one before and made steps for `pause` seconds, or, where it is
`hasty`, only for `pause` seconds after that strike, so that starts and recoveries are struck too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

WEIGHTS = {
    "worker": 36,  # SIGKILL a training worker
    "driver": 16,  # SIGKILL `minilm run`, and run the same command again
    "damage": 10,  # damage the newest checkpoint, and SIGKILL every worker
    "node": 10,  # add a raylet, or SIGKILL one with its workers
    "tracking": 8,  # SIGKILL the MLflow server, and start it again later
    "stop": 6,  # SIGSTOP a worker: it neither works nor dies
    "full": 6,  # leave no byte free on the disk of the work directory, and free it later
    "rival": 4,  # run the same command a second time, beside the first
    "cache": 4,  # SIGKILL every worker, and flip a bit of a cached shard
}
HASTY = ("worker", "driver")
HASTY_SHARE = 0.2
PAUSE_SECONDS = (0.5, 4.0)
LASTING_SECONDS = (4.0, 20.0)


class Strike(NamedTuple):
    """One thing that happens to the run.

    pause: seconds (see the module). pick: in [0, 1), chooses the victim or the kind of damage. lasting: seconds that
    the server is away or the disk full.
    """

    number: int
    kind: str
    pause: float
    hasty: bool
    pick: float
    lasting: float

    def text(self) -> str:
        when = "after the last strike" if self.hasty else "of steps"
        what = f"#{self.number} {self.kind}: {self.pause:.1f} s {when}"
        return f"{what}, pick {self.pick:.3f}, lasting {self.lasting:.1f} s"


def plan(seed: int, kinds: Sequence[str]) -> Iterator[Strike]:
    """The strikes of one round, drawn from `kinds` by WEIGHTS."""
    rng = random.Random(seed)
    weights = [WEIGHTS[kind] for kind in kinds]
    for number in count(1):
        kind = rng.choices(kinds, weights)[0]
        pause, lasting = rng.uniform(*PAUSE_SECONDS), rng.uniform(*LASTING_SECONDS)
        pick, hasty = rng.random(), rng.random() < HASTY_SHARE
        yield Strike(number, kind, pause, hasty and kind in HASTY, pick, lasting)
