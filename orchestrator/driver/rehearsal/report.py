"""What a rehearsal has shown: the parts that were seen, rates and memory beside the plan's, what the whole takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minilm.orchestrator.plan.report import long, size
from minilm.orchestrator.system.text import text_table


@dataclass(frozen=True)
class Part:
    """ok: None where the recipe does not ask for it."""

    name: str
    ok: bool | None
    text: str


@dataclass(frozen=True)
class StageRate:
    """A stage as it was measured, None where it was not, beside what the plan says; memory and checkpoint in bytes.

    planned_rate: from the rate of the first measured stage, so None for that one. seconds: of the whole stage in the
    true recipe, from its own rate, or where it has none from `planned_rate`.
    """

    stage: str
    workers: int
    rate: float | None
    planned_rate: float | None
    memory: int | None
    planned_memory: int | None
    checkpoint: int | None
    planned_checkpoint: int | None
    seconds: float | None


@dataclass(frozen=True)
class Rehearsal:
    """data: in words, what was read. at_most: a stage may end earlier. tokenizing_seconds: of the whole text, where it
    is not built. kept: the scratch folder, "" where it was removed."""

    recipe: str
    steps: int
    data: str
    parts: tuple[Part, ...]
    stages: tuple[StageRate, ...]
    at_most: bool
    tokenizing_seconds: float
    kept: str

    @property
    def seconds(self) -> float | None:
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def failed(self) -> list[Part]:
        return [part for part in self.parts if part.ok is False]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "failed": [part.name for part in self.failed]}

    def text(self) -> str:
        lines = [
            f"{self.recipe}, at most {self.steps} steps a stage with its own teachers, students, batches and workers",
            f"read: {self.data}",
            "",
        ]
        marks = {True: "seen", False: "NOT SEEN", None: "-"}
        lines += [f"  {part.name:<16}{marks[part.ok]:<10}{part.text}".rstrip() for part in self.parts]
        rows: list[Sequence[str]] = [
            (
                "stage",
                "workers",
                "tokens/s",
                "by plan",
                "memory",
                "by plan",
                "checkpoint",
                "by plan",
                "whole stage",
            )
        ]
        for one in self.stages:
            rates = [f"{rate:,.0f}" if rate else "-" for rate in (one.rate, one.planned_rate)]
            sizes = (one.memory, one.planned_memory, one.checkpoint, one.planned_checkpoint)
            takes = "-" if one.seconds is None else long(one.seconds)
            rows.append((one.stage, str(one.workers or "-"), *rates, *map(_size, sizes), takes))
        lines += ["", text_table(rows), ""]
        if self.seconds is None:
            lines.append("the whole recipe: unknown, as no stage was measured")
        else:
            most = "at most " if self.at_most else "about "
            lines.append(
                f"the whole recipe: {most}{long(self.seconds)} at these rates, without measuring and saving"
            )
        if self.tokenizing_seconds:
            lines.append(f"before it: about {long(self.tokenizing_seconds)} of tokenizing, once")
        return "\n".join([*lines, *[f"kept: {self.kept}"] * bool(self.kept)])


def _size(num_bytes: int | None) -> str:
    return size(num_bytes) if num_bytes else "-"
