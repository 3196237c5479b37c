"""The MiniLM papers' figures for the packaged recipes, and in a sentence what a run did otherwise.

Figures are of the GLUE and SQuAD 2.0 dev sets, means over the papers' seeds, here as shares of 1. Those of MRPC and QQP
are left out, because the papers do not say which of the two metrics in use they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METRICS = {
    "squad2": "f1",
    "mnli": "accuracy",
    "sst2": "accuracy",
    "qnli": "accuracy",
    "cola": "matthews",
    "rte": "accuracy",
}
PROTOCOL, TEXT = "glue-minilm", "Wikipedia and BookCorpus"
BERT_BASE, IN_HOUSE = "google-bert/bert-base-uncased", "an in-house BERT-base that is not public"


@dataclass(frozen=True)
class Figures:
    """Of one student of a paper: scores by task, of 0 to 1; the settings that they come from; where they stand."""

    scores: Mapping[str, float]
    source: str
    steps: int = 400_000
    teacher: str = BERT_BASE


def _of(source: str, *values: float, teacher: str = BERT_BASE) -> Figures:
    return Figures(dict(zip(METRICS, (v / 100 for v in values), strict=False)), source, teacher=teacher)


_P1, _V2 = "MiniLM (arXiv 2002.10957), table", "MiniLMv2, README of microsoft/unilm"
FIGURES = {
    "bert-l6-h768": _of(f"{_P1} 2", 76.4, 84.0, 92.0, 91.0, 49.2, 71.5),
    "bert-l6-h384": _of(f"{_P1} 3", 72.4, 82.2, 91.0),
    "bert-l4-h384": _of(f"{_P1} 3", 69.4, 80.3, 90.2),
    "bert-l3-h384": _of(f"{_P1} 3", 66.2, 78.8, 89.3),
    "bert-l6-h384-ta": _of(f"{_P1} 3", 72.7, 82.4, 91.2),
    "bert-l4-h384-ta": _of(f"{_P1} 3", 69.7, 80.6, 90.6),
    "bert-l3-h384-ta": _of(f"{_P1} 3", 66.9, 79.1, 89.7),
    "bert-l6-h384-attention-only": _of(f"{_P1} 5", 71.0, 80.9, 89.9),
    "bert-l6-h384-value-mse": _of(f"{_P1} 6", 71.4, 82.0, 90.8),
    "bert-l6-h384-layer-to-layer": _of(f"{_P1} 7", 71.6, 81.8, 90.6),
    "bert-l6-h384-soft-label-mlm": _of(f"{_P1} 3", 67.9, 79.6, 89.8),
    "inhouse-l12-h384": _of(f"{_P1} 8", 81.7, 85.7, 93.0, 91.5, 58.5, 73.3, teacher=IN_HOUSE),
    "inhouse-l6-h384-ta": _of(f"{_P1} 8", 75.6, 83.3, 91.5, 90.5, 47.5, 68.8, teacher=IN_HOUSE),
    "v2-bert-l6-h768": _of(_V2, 76.3, 84.2),
    "v2-bert-l6-h384": _of(_V2, 72.9, 82.8),
}


@dataclass(frozen=True)
class Beside:
    """A run of one of the papers' recipes. student: that the figures are of; data: what it read, in words."""

    figures: Figures
    student: str
    steps: int
    teacher: str
    data: str

    def table(self, ours: Mapping[str, tuple[str, str]]) -> list[list[str]]:
        """Rows of text, the header first. ours: (score, protocol) by task, as they are shown."""
        rows = [["task", "the paper", self.student, "by"]]
        for task, score in self.figures.scores.items():
            mine, protocol = ours.get(task, ("not run", "-"))
            rows.append([f"{task} ({METRICS[task]})", f"{score:.3f}", mine, protocol])
        return rows

    def sentence(self, protocols: Sequence[str]) -> str:
        """What was not reproduced. protocols: by which the student was scored."""
        theirs = self.figures
        other = []
        if self.steps != theirs.steps:
            other.append(f"{self.steps:,} steps instead of {theirs.steps:,}")
        if self.teacher != theirs.teacher:
            other.append(f"{self.teacher} as the teacher instead of {theirs.teacher}")
        other.append(f"the text is {self.data}, the paper's {TEXT}, in a version that is not published")
        wrong = [name for name in protocols if name.startswith("glue") and name != PROTOCOL]
        other += [f"fine-tuned by {name} instead of the paper's grid ({PROTOCOL})" for name in wrong]
        return f"Not reproduced of {theirs.source}: {'; '.join(other)}."
