"""Holds every run of the loop in every test to this: the teacher has the same bits after it as before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def teachers_stay() -> Iterator[None]:
    """Each `StageRun` that runs inside, however it ends, is checked; nothing is imported that was not.

    The only change allowed is the cast of weights to the dtype that a stage computes in.
    """
    worker = sys.modules.get("minilm.orchestrator.worker.loop")
    if worker is None:
        yield
        return
    import torch

    original = worker.StageRun.run

    def run(self, *arguments, **options):
        state = self.distiller.teacher.model.state_dict
        before = {name: weight.clone() for name, weight in state().items()}
        try:
            return original(self, *arguments, **options)
        finally:
            for name, weight in state().items():
                assert torch.equal(weight, before[name].to(weight.dtype)), f"the teacher has changed: {name}"

    worker.StageRun.run = run
    try:
        yield
    finally:
        worker.StageRun.run = original
