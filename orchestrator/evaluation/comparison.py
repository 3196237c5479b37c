"""Trials' results become scores: means over seeds, shares of the teacher, paired differences from the controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from minilm.orchestrator.evaluation.protocols import PROTOCOLS, Setting
from minilm.orchestrator.evaluation.sources import Source
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.system.text import text_table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends between which it lies with 95 % confidence over seeds (Student's t); None without two."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """What one model scores on one task. scores: of the headline metric, by seed; others: means of further metrics;
    seconds: of all its trials, also of settings that were not the best."""

    model: str
    task: str
    protocol: str
    metric: str
    scores: tuple[float, ...]
    others: Mapping[str, float]
    setting: Setting
    train_rows: int | None
    data_digest: str
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "task": self.task,
            "protocol": self.protocol,
            "metric": self.metric,
            "score": self.mean,
            "spread": self.spread,
            "scores": list(self.scores),
            "others": dict(self.others),
            "setting": self.setting.as_dict() | self._chosen,
            "train_rows": self.train_rows,
            "seconds": round(self.seconds, 3),
        }

    @property
    def sets(self) -> list[str]:
        """Of a search, those that the mean is over."""
        is_search = TASKS[self.task].kind == "retrieval"
        return [name.removeprefix(f"{self.metric}_") for name in self.others] if is_search else []

    @property
    def _chosen(self) -> dict[str, str]:
        chosen = PROTOCOLS[self.protocol].chosen
        return {"chosen": chosen} if chosen else {}

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


def score_all(results: Iterable[Mapping[str, Any]]) -> list[Score]:
    """A score for each model, task and protocol from the results of trials, in their order: of the setting with the
    best mean over seeds. Data of other bytes and other training rows are other scores."""
    groups: dict[tuple, dict[Setting, list[Mapping[str, Any]]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("model", "task", "protocol", "train_rows", "data_digest"))
        groups.setdefault(key, {}).setdefault(Setting(**result["setting"]), []).append(result)
    found = []
    for (model, task, protocol, train_rows, data_digest), by_setting in groups.items():
        metric = TASKS[task].metrics[0]
        means = {s: statistics.fmean(r["metrics"][metric] for r in group) for s, group in by_setting.items()}
        best = max(means, key=means.__getitem__)
        group = sorted(by_setting[best], key=lambda result: result["seed"])
        others = [name for name in group[0]["metrics"] if name != metric]
        found.append(
            Score(
                model=model,
                task=task,
                protocol=protocol,
                metric=metric,
                scores=tuple(result["metrics"][metric] for result in group),
                others={name: statistics.fmean(r["metrics"][name] for r in group) for name in others},
                setting=best,
                train_rows=train_rows,
                data_digest=data_digest,
                seconds=sum(result["seconds"] for group in by_setting.values() for result in group),
            )
        )
    return found


def share_of(teacher: Score, student: Score) -> Interval | None:
    """Which part of the teacher's score a model keeps; the interval is over ratios of the same seeds.

    None where the teacher scores 0 or less: a share of nothing says nothing.
    """
    if teacher.mean <= 0:
        return None
    pairs = _paired(student.scores, teacher.scores)
    if pairs is None or any(t <= 0 for _, t in pairs):
        return Interval(student.mean / teacher.mean, None, None)
    return interval([s / t for s, t in pairs])


def difference(one: Score, other: Score) -> Interval:
    """one - other, seed by seed where both have the same seeds."""
    pairs = _paired(one.scores, other.scores)
    if pairs is None:
        return Interval(one.mean - other.mean, None, None)
    return interval([a - b for a, b in pairs])


def _paired(one: Sequence[float], other: Sequence[float]) -> list[tuple[float, float]] | None:
    """By seed; a score that no seed changes (one number) stands beside each of the other's."""
    if len(one) == len(other):
        return list(zip(one, other, strict=True))
    if len(other) == 1:
        return [(a, other[0]) for a in one]
    if len(one) == 1:
        return [(one[0], b) for b in other]
    return None


def interval(values: Sequence[float]) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Comparison:
    """The scores of several models side by side. teacher: the name of the one that shares are of, if any."""

    scores: Sequence[Score]
    sources: Sequence[Source]
    teacher: str | None = None

    def find(self, model: str | None, task: str) -> Score | None:
        return next((s for s in self.scores if (s.model, s.task) == (model, task)), None)

    def share(self, score: Score) -> Interval | None:
        """Of the teacher's score; None for the teacher itself and without one."""
        teacher = self.find(self.teacher, score.task)
        return None if teacher is None or teacher is score else share_of(teacher, score)

    def protocols(self) -> dict[str, list[str]]:
        """The tasks of each protocol, in order: a table for each."""
        found: dict[str, list[str]] = {}
        for score in self.scores:
            tasks = found.setdefault(score.protocol, [])
            if score.task not in tasks:
                tasks.append(score.task)
        return found

    def table(self, protocol: str) -> list[list[str]]:
        """Rows of text, the header first: each model's scores, and what it keeps of the teacher's."""
        tasks = self.protocols()[protocol]
        shown = [next(score for score in self.scores if score.task == task) for task in tasks]
        header = ["model"]
        for score in shown:
            header.append(f"{score.task} ({score.metric})")
            header += ["of the teacher"] if self.teacher else []
        rows = [header]
        for source in self.sources:
            row = [source.name + (" (teacher)" if source.name == self.teacher else "")]
            for task in tasks:
                found = self.find(source.name, task)
                share = found and self.share(found)
                row.append(str(found) if found else "-")
                row += [percent(share) if share else "-"] if self.teacher else []
            rows.append(row)
        return rows

    def paired(self) -> list[str]:
        """A sentence for each model, task and control: the difference, and whether it is beyond the spread."""
        lines = []
        for source in self.sources:
            if source.is_control or source.name == self.teacher:
                continue
            for control in (other for other in self.sources if other.is_control):
                for task in dict.fromkeys(score.task for score in self.scores):
                    one, other = self.find(source.name, task), self.find(control.name, task)
                    if one and other:
                        lines.append(
                            f"{task}: {source.name} - {control.name} = {verdict(difference(one, other))}"
                        )
        return lines

    def notes(self) -> list[str]:
        """What a reader has to know of how the numbers came about."""
        lines = []
        for name in self.protocols():
            scores = [score for score in self.scores if score.protocol == name]
            seeds = sorted({len(score.scores) for score in scores})
            lines.append(
                f"{name}: mean ± standard deviation over {' or '.join(map(str, seeds))} seed"
                + ("s" if seeds != [1] else "")
            )
            if chosen := PROTOCOLS[name].chosen:
                lines.append(f"{name}: each score is of {chosen}")
            for sets in dict.fromkeys(tuple(score.sets) for score in scores if score.sets):
                count = f"{len(sets)} set{'s' * (len(sets) > 1)}"
                lines.append(f"nanobeir: the mean over {count}: {', '.join(sets)}")
            rows = {score.train_rows for score in scores if score.train_rows}
            lines += [f"{name}: learnt from {count:,} training rows at most" for count in sorted(rows)]
        return lines

    def text(self) -> str:
        """The tables for a terminal."""
        parts = [text_table(self.table(protocol)) for protocol in self.protocols()]
        if paired := self.paired():
            parts.append(
                "Seed by seed against the controls, with the 95 % interval:\n  " + "\n  ".join(paired)
            )
        parts.append("\n".join(self.notes()))
        return "\n\n".join(parts)


def percent(share: Interval) -> str:
    if share.low is None or share.high is None:
        return f"{share.mean:.1%}"
    return f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"


def verdict(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f} (one seed: no interval)"
    word = "better" if found.low > 0 else "worse" if found.high < 0 else "no difference beyond the spread"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {word}"
