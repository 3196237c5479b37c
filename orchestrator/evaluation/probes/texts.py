"""Probes that read a task's published files: sentences as vectors, with no training of the model.

They read the dev split, so that a test split stays unseen by whoever stops a stage by them.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from minilm.data.tokenizer import load_tokenizer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.orchestrator.evaluation.metrics import score
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.evaluation.probes.evaluator import Evaluator, HeldOutPass
from minilm.orchestrator.evaluation.probes.vectors import text_vectors
from minilm.orchestrator.evaluation.read_tables import Examples, has_split, read_split
from minilm.orchestrator.evaluation.tasks import TASKS

TOKENS, BATCH = 256, 64  # as protocol embed-fast has them
TRAIN_ROWS, DEV_ROWS = 1024, 2048  # at most, of a linear classifier: few labels, and a minute


class TextProbe(Evaluator):
    """A score of any encoder on a task, in the unit of the task's first metric; the teacher's is found once."""

    def run(self, given: HeldOutPass) -> dict[str, dict[str, float]]:
        if self.teacher is None:
            self.teacher = self.score(given.distiller.teacher, given)
        return {
            name: self.metrics(self.score(student, given), self.teacher)
            for name, student in given.distiller.students.items()
        }

    teacher: float | None = None

    @abstractmethod
    def score(self, encoder: TappedEncoder, given: HeldOutPass) -> float:
        """The task's first metric, at most 1."""

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.stage.data.tokenizer)

    @property
    def task(self):
        return TASKS[PROBES[self.name].task]

    def split(self, *names: str) -> Examples:
        """The first of these splits that there is."""
        data = Path(self.probe.data)
        return read_split(
            self.task, data, next((s for s in names if has_split(self.task, data, s)), names[-1])
        )

    def vectors(self, encoder: TappedEncoder, texts: list[str], given: HeldOutPass) -> np.ndarray:
        """float64 [texts, width]; each text is computed once."""
        once = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(once)}
        found = text_vectors(encoder, self.tokenizer, once, given, tokens=TOKENS, batch=BATCH)
        return found[[place[text] for text in texts]]


class Similarity(TextProbe):
    """How well the cosine of two sentences' vectors orders pairs that people have judged."""

    @cached_property
    def pairs(self) -> Examples:
        return self.split("dev", *self.task.dev)

    def score(self, encoder: TappedEncoder, given: HeldOutPass) -> float:
        pairs = self.pairs
        vectors = self.vectors(encoder, [*pairs.first, *(pairs.second or ())], given)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        one, other = np.split(vectors, 2)
        metric = self.task.metrics[0]
        return score((metric,), pairs.labels, (one * other).sum(axis=1))[metric]


class LinearClassifier(TextProbe):
    """Logistic regression on frozen vectors; of a pair on both, their distance and their product (SentEval, 1803.05449,
    section 3)."""

    @cached_property
    def examples(self) -> tuple[Examples, Examples]:
        found = self.split("train"), self.split(*self.task.dev)
        chosen = []
        for examples, most in zip(found, (TRAIN_ROWS, DEV_ROWS), strict=True):
            order = np.random.default_rng(0).permutation(len(examples))
            chosen.append(examples.pick(np.sort(order[:most])))
        return chosen[0], chosen[1]

    def score(self, encoder: TappedEncoder, given: HeldOutPass) -> float:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        train, dev = self.examples
        features = self.features(encoder, train, given), self.features(encoder, dev, given)
        scaler = StandardScaler().fit(features[0])
        model = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(features[0]), train.labels)
        metric = self.task.metrics[0]
        return score((metric,), dev.labels, model.predict(scaler.transform(features[1])))[metric]

    def features(self, encoder: TappedEncoder, examples: Examples, given: HeldOutPass) -> np.ndarray:
        second = examples.second
        vectors = self.vectors(encoder, [*examples.first, *(second or ())], given)
        if second is None:
            return vectors
        one, other = np.split(vectors, 2)
        return np.concatenate([one, other, np.abs(one - other), one * other], axis=1)
