"""The table at the end of a run, and what to do next."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minilm.orchestrator.stage.metrics_file import Point
from minilm.orchestrator.system.text import duration, text_table


@dataclass(frozen=True)
class ModelEntry:
    """One line of the table. `before` and `after`: held-out divergence by term, in nats a query; `before` is empty when
    nobody measured it, or it was lost with a work directory."""

    name: str
    role: str
    layers: int
    hidden: int
    parameters: int
    tokens_per_second: float
    before: dict[str, float]
    after: dict[str, float]
    registered: str
    folder: str


@dataclass(frozen=True)
class Summary:
    """A finished curriculum: its models in order, how long this run took, how to look at the tracked runs."""

    recipe: str
    models: tuple[ModelEntry, ...]
    seconds: float
    look: str
    workdir: str
    alias: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Summary:
        values = json.loads(path.read_text(encoding="utf-8"))
        models = tuple(ModelEntry(**model) for model in values["models"])
        return cls(**values | {"models": models})

    def table(self) -> str:
        header = (
            "model", "layers x hidden", "parameters", "held-out divergence (first step → last)",
            "tokens/s", "registered",
        )  # fmt: skip
        rows = [
            (
                f"{model.name} ({model.role})",
                f"{model.layers} x {model.hidden}",
                f"{model.parameters / 1e6:.1f} M",
                divergence(model),
                f"{model.tokens_per_second:,.0f}",
                model.registered or "-",
            )
            for model in self.models
        ]
        return text_table([header, *rows])

    def next_steps(self) -> str:
        """Commands that work as they stand, from the current folder."""
        last = self.models[-1]
        name = last.registered.split(" ")[0]
        local = self.look.startswith("mlflow ")  # no server: the work directory's own store
        look = f"{command('mlflow')}{self.look.removeprefix('mlflow')}" if local else self.look
        registry = f" --workdir {self.workdir}" if local else ""
        load = f"import transformers; print(transformers.AutoModel.from_pretrained('{last.folder}'))"
        return "\n".join(
            (
                f"Look further (work directory {self.workdir}; {duration(self.seconds)} for this run):",
                f"  the tracked runs   {look}",
                f"  the pictures       {Path(last.folder).parent.parent}/*.png",
                f'  load the student   {command("python")} -c "{load}"',
                f"  pull it            {command('minilm')} pull models:/{name}@{self.alias} DIR{registry}",
                f"  another recipe     {command('minilm')} new other.yaml",
            )
        )


def terms(metrics: dict[str, float], student: str) -> dict[str, float]:
    """The held-out divergence of the whole mixture by term; a corpus's own values, TERM/CORPUS, are left out."""
    prefix = f"{student}/heldout/"
    found = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {term: value for term, value in found.items() if "/" not in term}


class Gain(NamedTuple):
    """What a student has learned so far. before, after: held-out divergence, the sum over terms in nats a query, at
    step 0 (None where nobody measured it) and now. probes: by name the first value, the newest one and its share of
    the teacher's own, None where the teacher has none."""

    before: float | None
    after: float
    probes: dict[str, tuple[float, float, float | None]]

    def text(self) -> str:
        """`held-out divergence 1.664 → 0.631 (38% of the start), knn 0.310 → 0.620 (81% of the teacher's)`."""
        before = "?" if self.before is None else f"{self.before:.3f}"
        share = f" ({self.after / self.before:.0%} of the start)" if self.before else ""
        parts = [f"held-out divergence {before} → {self.after:.3f}{share}"]
        for name, (first, last, of_teacher) in self.probes.items():
            share = "" if of_teacher is None else f" ({of_teacher:.0%} of the teacher's)"
            parts.append(f"{name} {first:.3f} → {last:.3f}{share}")
        return ", ".join(parts)


def gains(points: Sequence[Point], students: Sequence[str]) -> dict[str, Gain]:
    """By student, of the points of a stage's held-out file; those that nobody measured are left out."""
    found = {}
    for student in students:
        sums = [(p.step, sum(by_term.values())) for p in points if (by_term := terms(p.metrics, student))]
        if not sums:
            continue
        prefix = f"{student}/heldout/probe/"
        probes: dict[str, list[float]] = {}
        for point in points:
            for key, value in point.metrics.items():
                if key.startswith(prefix):
                    probes.setdefault(key.removeprefix(prefix), []).append(value)
        own = {
            name: (values[0], values[-1], probes.get(f"{name}/share-of-teacher", [None])[-1])
            for name, values in probes.items()
            if "/" not in name
        }
        found[student] = Gain(None if sums[0][0] else sums[0][1], sums[-1][1], own)
    return found


def gains_text(found: dict[str, Gain]) -> str:
    """On one line; each student by its name where there are several."""
    return "; ".join(
        f"{name}: {gain.text()}" if len(found) > 1 else gain.text() for name, gain in found.items()
    )


def command(name: str) -> str:
    """How this environment's `name` is called from here: by its name if the PATH finds it, else by its path."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found and Path(found).parent == own.parent:
        return name
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def divergence(model: ModelEntry) -> str:
    """`attention 1.02 → 0.31, value 0.71 → 0.25, sum 1.73 → 0.56 (32 %)`; `-` for a teacher."""
    if not model.after:
        return "-"
    if not model.before:
        parts = [f"{term} ? → {value:.3f}" for term, value in model.after.items()]
        return f"{', '.join(parts)}, sum ? → {sum(model.after.values()):.3f}"
    parts = [f"{term} {model.before[term]:.3f} → {model.after[term]:.3f}" for term in model.before]
    before, after = sum(model.before.values()), sum(model.after.values())
    share = f" ({after / before:.0%})" if before else ""
    return f"{', '.join(parts)}, sum {before:.3f} → {after:.3f}{share}"
