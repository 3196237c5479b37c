"""The probes that a recipe can name, one row each. Imports nothing heavy: the recipe's schema is made from this table.

divergence    the objective on held-out rows, in nats a query; in every stage, named or not (lower is better)
knn           the share of the 10 nearest neighbours of each held-out row that teacher and student have in common
cka           linear CKA of the held-out rows' vectors (Kornblith et al. 2019, 1905.00414, eq. 3)
stsb-embed    Spearman of the cosine of two sentences' vectors and what people said, on STS-B's dev split
linear-TASK   a linear classifier on frozen vectors, learned from few labels, on the task's dev split
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """evaluator: its class, MODULE:NAME, where a module without a dot is one of this room. task: whose published files
    it reads, "" for none. rows: whether it takes another data set's held-out rows. teacher: whether the teacher has a
    value too, of which the students keep a share."""

    evaluator: str
    task: str = ""
    rows: bool = False
    teacher: bool = True
    higher_is_better: bool = True


DIVERGENCE = "divergence"
PROBES = {
    DIVERGENCE: Probe("divergence:Divergence", teacher=False, higher_is_better=False),
    "knn": Probe("agreement:Neighbours", rows=True),
    "cka": Probe("agreement:LinearCka", rows=True),
    "stsb-embed": Probe("texts:Similarity", "stsb-embed"),
    **{
        f"linear-{task}": Probe("texts:LinearClassifier", task)
        for task in ("cola", "sst2", "mrpc", "rte", "qnli", "qqp", "mnli")
    },
}
