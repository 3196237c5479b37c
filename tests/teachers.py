"""Holds every run of the loop in every test to this: the teacher has the same bits after it as before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def teachers_stay() -> Iterator[None]:
    """Each `StageRun` that runs inside, however it ends, is checked; nothing is imported that was not."""
    worker = sys.modules.get("minilm.orchestrator.worker.loop")
    if worker is None:
        yield
        return
    from minilm.model.export import weights_digest

    original = worker.StageRun.run

    def run(self, *arguments, **options):
        state = self.distiller.teacher.model.state_dict
        before = weights_digest(state())
        try:
            return original(self, *arguments, **options)
        finally:
            assert weights_digest(state()) == before, "the teacher has changed"

    worker.StageRun.run = run
    try:
        yield
    finally:
        worker.StageRun.run = original
