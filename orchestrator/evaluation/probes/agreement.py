"""How far teacher and student agree which held-out rows are alike: no labels, and no one width for both.

Products are torch's, whose threads a stage keeps; numpy's have other bits for other numbers of threads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from minilm.orchestrator.evaluation.probes.evaluator import Evaluator, HeldOutPass
from minilm.orchestrator.evaluation.probes.vectors import row_vectors
from minilm.orchestrator.feed.corpora import HeldOut, describe, open_held_out
from minilm.orchestrator.stage.data import CorpusSpec

NEIGHBOURS = 10


class Agreement(Evaluator):
    """A number from 0 to 1 for each student; 1, the teacher's agreement with itself, is the teacher's value."""

    def run(self, given: HeldOutPass) -> dict[str, dict[str, float]]:
        if self.probe.data:
            given = replace(given, corpora=self.others)
        if self.teacher is None:
            self.teacher = row_vectors(given.distiller.teacher, given)
        return {
            name: self.metrics(self.agreement(self.teacher, row_vectors(student, given)), of_teacher=1.0)
            for name, student in given.distiller.students.items()
        }

    teacher: np.ndarray | None = None

    @cached_property
    def others(self) -> list[HeldOut]:
        """The held-out rows of the data set that the probe names."""
        return open_held_out(describe([CorpusSpec(self.name, self.probe.data)]))

    @staticmethod
    @abstractmethod
    def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
        """Of vectors [rows, width], float64."""


class Neighbours(Agreement):
    """The mean share of common nearest neighbours, by cosine; by chance it is about neighbours / rows."""

    @staticmethod
    def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
        number = min(NEIGHBOURS, (len(teacher) - 1) // 3)  # of all others everybody has the same
        ours, theirs = _neighbours(student, number), _neighbours(teacher, number)
        common = [len({*a} & {*b}) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        return sum(common) / max(number * len(common), 1)


class LinearCka(Agreement):
    """Centred kernel alignment with linear kernels: blind to rotation and scale."""

    @staticmethod
    def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
        one, other = (torch.from_numpy(v - v.mean(axis=0)) for v in (teacher, student))
        norms = float((one.T @ one).norm() * (other.T @ other).norm())
        return float((other.T @ one).norm() ** 2) / norms if norms else 0.0


def _neighbours(vectors: np.ndarray, number: int) -> np.ndarray:
    """int [rows, number]: the rows nearest to each, itself left out; of equally near ones the first."""
    centred = vectors - vectors.mean(axis=0)  # else all rows point the same way, by the mean that they share
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-12)
    near = (torch.from_numpy(unit) @ torch.from_numpy(unit.T)).numpy()
    np.fill_diagonal(near, -np.inf)
    return np.argsort(-near, axis=1, kind="stable")[:, :number]
