"""Weights between a student's start and what training made of them: those that are measured and exported.

On the line between the two often lies a model that is better than both, above all on text of other kinds than it was
trained on (LM-Cocktail, arXiv:2311.13534, of embedders; WiSE-FT, arXiv:2109.01903, of classifiers of pictures).
Invariant: training doesn't see them. A checkpoint holds the trained weights and the start, so that a resumed run has
both, whatever became of the files that the start was made of.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilm.model.distiller import Distiller
from minilm.orchestrator.stage.spec import StudentSpec


class Start(nn.Module):
    """The trained parameters of a student as they were when this was made, which is before any step.

    `mix()` moves them so that each is share * start + (1 - share) * trained, and returns the trained ones. Each
    operation is rounded by itself, so that the bits do not depend on who computes it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], share: float):
        super().__init__()
        self._parameters_now, self.share = dict(parameters), share
        for name, parameter in parameters.items():
            self.register_buffer(_buffer(name), parameter.detach().clone())

    @torch.no_grad()
    def mix(self) -> dict[str, Tensor]:
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters_now.items()}
        for name, parameter in self._parameters_now.items():
            parameter.mul_(1 - self.share).add_(self.get_buffer(_buffer(name)) * self.share)
        return trained

    @torch.no_grad()
    def put_back(self, trained: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters_now.items():
            parameter.copy_(trained[name])


class StartShares:
    """The starts of the students that have a `start_share`; other students are left as they are.

    So is a projection beside a student, which starts at random and is not exported.
    """

    def __init__(self, students: Iterable[StudentSpec], distiller: Distiller):
        self._starts = {
            student.name: Start(_exported(distiller.trained_parameters(student.name)), student.start_share)
            for student in students
            if student.start_share
        }

    def state_module(self, name: str, trained: nn.Module) -> nn.Module:
        """What a checkpoint of student `name` holds: the state of `trained`, and its start."""
        start = self._starts.get(name)
        return trained if start is None else nn.ModuleDict({"trained": trained, "start": start})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the students have the weights that are measured and exported; then the trained ones again."""
        mixed = [(start, start.mix()) for start in self._starts.values()]
        try:
            yield
        finally:
            for start, trained in mixed:
                start.put_back(trained)


def _exported(trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in trained.items() if not name.startswith("projection.")}


def _buffer(name: str) -> str:
    return name.replace(".", "/")
