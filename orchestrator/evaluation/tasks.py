"""The tasks: what each is called, where its published files lie, what its labels mean, how it is scored.

To add one whose files are tables, write its row. Reading the files is in `read_tables.py`, SQuAD's in `squad.py`, those
of a search in `retrieval.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minilm.orchestrator.errors import UserError

BINARY = {"0": 0, "1": 1}
NLI = {"entailment": 0, "neutral": 1, "contradiction": 2}
ENTAILMENT = {"entailment": 0, "not_entailment": 1}


UNTRAINED = ("cosine", "retrieval")  # kinds of tasks


@dataclass(frozen=True)
class Layout:
    """One published form of a task's files.

    files: the file names of each split, read one after the other; they lie in the task's folder or in `raw/` of it.
    first, second, label: columns, by the header's names, or by number (from 0) in files without a header.
    """

    files: Mapping[str, tuple[str, ...]]
    first: str | int
    label: str | int
    second: str | int | None = None
    language: str | int | None = None

    @property
    def has_header(self) -> bool:
        return isinstance(self.label, str)


@dataclass(frozen=True)
class Task:
    """One task.

    kind: "classes" and "score" (a number) are fine-tuned on sentences or pairs, "spans" on questions and passages,
    "cosine" and "retrieval" are not trained at all. labels: the class of each label in the files; `score_range` where
    it is a number.
    metrics: the first is the one that a table shows. dev: the splits that are scored, the headline's first.
    ignored: a label of rows that nobody could agree on, which are left out.
    """

    name: str
    folders: tuple[str, ...]
    kind: str
    metrics: tuple[str, ...]
    layouts: tuple[Layout, ...]
    labels: Mapping[str, int] = field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    dev: tuple[str, ...] = ("dev",)
    long_training: bool = False  # glue-minilm tries up to 10 epochs
    ignored: str | None = None
    trained_on: str | None = None  # another task, whose train split this one learns from

    @property
    def is_trained(self) -> bool:
        return self.kind not in UNTRAINED

    @property
    def num_labels(self) -> int:
        return len(set(self.labels.values())) or 1


def _tsv(train: str = "train.tsv", dev: str = "dev.tsv") -> dict[str, tuple[str, ...]]:
    return {"train": (train,), "dev": (dev,)}


_STSB = (
    Layout(
        {"train": ("train.tsv",), "dev": ("dev.tsv",)},
        "sentence1",
        "score",
        "sentence2",
    ),
    Layout(
        {"train": ("sts-train.csv",), "dev": ("sts-dev.csv",), "test": ("sts-test.csv",)},
        5,
        4,
        6,
    ),
)
_MNLI_FILES = {"matched": ("dev_matched.tsv",), "mismatched": ("dev_mismatched.tsv",)}

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            ("CoLA", "cola_public"),
            "classes",
            ("matthews", "accuracy"),
            (
                Layout(_tsv(), 3, 1),
                Layout(
                    {
                        "train": ("in_domain_train.tsv",),
                        "dev": ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
                    },
                    3,
                    1,
                ),
            ),
            BINARY,
            long_training=True,
        ),
        Task("sst2", ("SST-2",), "classes", ("accuracy",), (Layout(_tsv(), "sentence", "label"),), BINARY),
        Task(
            "mrpc",
            ("MRPC",),
            "classes",
            ("f1", "accuracy"),
            (Layout(_tsv(), "#1 String", "Quality", "#2 String"),),
            BINARY,
            long_training=True,
        ),
        Task(
            "stsb",
            ("STS-B", "stsbenchmark"),
            "score",
            ("spearman", "pearson"),
            _STSB,
            score_range=(0.0, 5.0),
        ),
        Task(
            "qqp",
            ("QQP",),
            "classes",
            ("f1", "accuracy"),
            (Layout(_tsv(), "question1", "is_duplicate", "question2"),),
            BINARY,
        ),
        Task(
            "mnli",
            ("MNLI", "multinli_1.0"),
            "classes",
            ("accuracy",),
            (
                Layout(
                    {"train": ("train.tsv",), **_MNLI_FILES},
                    "sentence1",
                    "gold_label",
                    "sentence2",
                ),
                Layout(
                    {
                        "train": ("multinli_1.0_train.txt",),
                        "matched": ("multinli_1.0_dev_matched.txt",),
                        "mismatched": ("multinli_1.0_dev_mismatched.txt",),
                    },
                    "sentence1",
                    "gold_label",
                    "sentence2",
                ),
            ),
            NLI,
            dev=("matched", "mismatched"),
            ignored="-",
        ),
        Task(
            "qnli",
            ("QNLI",),
            "classes",
            ("accuracy",),
            (Layout(_tsv(), "question", "label", "sentence"),),
            ENTAILMENT,
        ),
        Task(
            "rte",
            ("RTE",),
            "classes",
            ("accuracy",),
            (Layout(_tsv(), "sentence1", "label", "sentence2"),),
            ENTAILMENT,
            long_training=True,
        ),
        Task("squad2", ("SQuAD2", "squad_v2", "squad"), "spans", ("f1", "exact"), ()),
        Task(
            "xnli",
            ("XNLI", "XNLI-1.0"),
            "classes",
            ("accuracy",),
            (
                Layout(
                    {"dev": ("xnli.test.tsv",)},
                    "sentence1",
                    "gold_label",
                    "sentence2",
                    language="language",
                ),
            ),
            NLI,
            ignored="-",
            trained_on="mnli",
        ),
        Task(
            "stsb-embed",
            ("STS-B", "stsbenchmark"),
            "cosine",
            ("spearman", "pearson"),
            _STSB,
            score_range=(0.0, 5.0),
            dev=("test", "dev"),
        ),
        Task("nanobeir", ("NanoBEIR", "NanoBEIR-en"), "retrieval", ("ndcg_at_10",), ()),
    )
}


def plain(name: str) -> str:
    """A name without what people write differently: SST-2, sst_2 and sst2 are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, each once. UserError names what there is instead."""
    by_name = {plain(name): task for name, task in TASKS.items()}
    found: dict[str, Task] = {}
    for name in names:
        if plain(name) not in by_name:
            close = difflib.get_close_matches(plain(name), by_name, n=1)
            mean = f"did you mean {by_name[close[0]].name!r}? " if close else ""
            raise UserError(f"no task is called {name!r}; {mean}there are {', '.join(TASKS)}")
        task = by_name[plain(name)]
        found[task.name] = task
    return list(found.values())
