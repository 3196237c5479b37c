"""Weights between a student's start and what training made of them: those that are measured and exported.

On the line between the two often lies a model that is better than both, above all on text of other kinds than it was
trained on (WiSE-FT, arXiv:2109.01903; of embedders LM-Cocktail, arXiv:2311.13534).
Invariant: training doesn't see them, so that a checkpoint holds the trained weights, and a resumed run goes on from
these.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from minilm.model.distiller import Distiller
from minilm.orchestrator.stage.spec import StudentSpec


class StartShares:
    """The starts of the students that have a `start_share`, kept beside their weights; made before any step.

    `applied()`: within it each of their trained parameters is start_share * start + (1 - start_share) * trained. Each
    operation is rounded by itself, so that the bits do not depend on who computes it.
    """

    def __init__(self, students: Iterable[StudentSpec], distiller: Distiller):
        self._kept = [
            (parameter, parameter.detach() * student.start_share, 1 - student.start_share)
            for student in students
            if student.start_share
            for parameter in distiller.trained_parameters(student.name).values()
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        trained = [parameter.detach().clone() for parameter, _, _ in self._kept]
        with torch.no_grad():
            for parameter, start, rest in self._kept:
                parameter.mul_(rest).add_(start)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _, _), own in zip(self._kept, trained, strict=True):
                    parameter.copy_(own)
