"""The report of a soak: faults, recoveries, goodput, and whether every invariant held."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilm.orchestrator.system.text import duration

FAILURES = (
    "worker",
    "driver",
    "damage",
    "cache",
    "node killed",
    "stop",
)  # failures of machines
KILLS = ("worker", "driver", "damage", "cache", "node killed")
FAILURE_EVERY_SECONDS = 600.0
GOODPUT_AIM = 0.9


@dataclass
class Recovery:
    """A recovery from a fault.

    seconds: from the fault to the end of the first step after it. repeated: steps computed again. lost: `seconds` plus
    the time of the repeated steps. alone: no other fault fell into it.
    """

    kind: str
    seconds: float
    repeated: int
    lost: float
    alone: bool


@dataclass
class Report:
    """Counts and problems of all rounds so far.

    injected, without_effect: numbers of faults by kind. problems: by the name of the invariant. useful, wall: of all
    finished rounds, the seconds that their steps take without faults and the seconds from first start to end.
    """

    seed: int
    injected: Counter[str] = field(default_factory=Counter)
    without_effect: Counter[str] = field(default_factory=Counter)
    recoveries: list[Recovery] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    rounds: int = 0
    steps: int = 0
    useful: float = 0.0
    wall: float = 0.0

    @property
    def kills(self) -> int:
        return sum(self.injected[kind] for kind in KILLS)

    @property
    def passed(self) -> bool:
        return self.rounds > 0 and not any(self.problems.values())

    @property
    def cost(self) -> float | None:
        """Mean seconds lost by a failure that no other fault fell into."""
        lost = [r.lost for r in self.recoveries if r.alone and r.kind in FAILURES]
        return statistics.fmean(lost) if lost else None

    @property
    def expected_goodput(self) -> float | None:
        """The goodput at one failure in 10 minutes."""
        return None if self.cost is None else max(0.0, 1 - self.cost / FAILURE_EVERY_SECONDS)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rounds": self.rounds,
            "steps": self.steps,
            "kills": self.kills,
            "injected": dict(self.injected),
            "without_effect": dict(self.without_effect),
            "recoveries": [vars(r) for r in self.recoveries],
            "seconds_lost_by_a_failure": self.cost,
            "goodput_at_one_failure_in_10_minutes": self.expected_goodput,
            "goodput_here": self.useful / self.wall if self.wall else None,
            "wall_seconds": self.wall,
            "problems": {name: list(found) for name, found in self.problems.items()},
            "passed": self.passed,
        }

    def text(self) -> str:
        lines = [
            f"{self.kills} kills in {self.rounds} finished rounds of {self.steps:,} steps, {duration(self.wall)}",
            "",
            f"{'fault':<14}{'count':>6}{'no effect':>11}{'recovered':>11}"
            f"{'20 %':>8}{'median':>8}{'80 %':>8}{'max s':>8}"
            f"{'steps repeated':>16}",
        ]
        for kind in sorted(self.injected):
            found = [r for r in self.recoveries if r.kind == kind and r.alone]
            row = f"{kind:<14}{self.injected[kind]:>6}{self.without_effect[kind]:>11}{len(found):>11}"
            if found:
                row += "".join(f"{q:>8.1f}" for q in quantiles([r.seconds for r in found]))
                row += f"{statistics.median(r.repeated for r in found):>16.0f}"
            lines.append(row)
        lines.append(
            "(recovered: without another fault in between; seconds to the next step; steps repeated: median)"
        )
        if self.wall:
            lines += [
                "",
                f"goodput here: {self.useful / self.wall:.1%} (steps at their speed without faults)",
            ]
        if self.cost is not None and self.expected_goodput is not None:
            lines.append(
                f"a failure costs {self.cost:.1f} s on average; at one in 10 minutes goodput would be "
                f"{self.expected_goodput:.1%} (aim {GOODPUT_AIM:.0%})"
            )
        lines.append("")
        for name, problems in self.problems.items():
            lines.append(f"{name:<12}{'holds' if not problems else f'{len(problems)} PROBLEMS'}")
            lines += [f"    {problem}" for problem in problems]
        if not self.rounds:
            lines.append("no round was finished, so nothing was checked")
        return "\n".join(lines)


def quantiles(values: list[float]) -> tuple[float, float, float, float]:
    """The 20 % quantile, the median, the 80 % quantile and the maximum."""
    if len(values) == 1:
        return (values[0],) * 4
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7], max(values)


def say(text: str) -> None:
    """Print a line with the time on standard error."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{log} ends with: {lines[-1][:300]}" if lines else f"{log} is empty"
