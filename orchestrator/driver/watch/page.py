"""What `minilm watch` shows: the run as lines for a terminal of any width, and as log lines where there is none."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from minilm.orchestrator.driver.run_status import (
    DRIVER,
    RunStatus,
    StageStatus,
    checkpoint_text,
    held_out_text,
    probes_text,
)
from minilm.orchestrator.driver.summary import gains, gains_text, terms
from minilm.orchestrator.driver.watch.curves import ASCII_LEVELS, LEVELS, Curves, sparkline
from minilm.orchestrator.system.text import duration

NARROW, WIDE = 12, 40  # columns of a curve, at least and at most
BAR = 20
# of a stage's state: a mark, the same in ASCII, a colour
MARKS = {
    "done": ("✓", "+", "green"),
    "trained": ("✓", "+", "green"),
    "running": ("▶", ">", "cyan"),
    "stopped": ("■", "#", "red"),
    "waiting": ("·", ".", "dim"),
}


def page(
    status: RunStatus, curves: Mapping[str, Curves], width: int, *, ascii_only: bool = False
) -> list[Text]:
    """The run in lines: who works there, the stages in order, and of the newest that has begun its curves and facts.

    curves: by stage. width: of the terminal, in characters; lines may be longer and are to be cut.
    """
    lines = [Text(f"{status.recipe or 'a run'} in {status.workdir}", "bold"), driver_line(status)]
    if status.preparing:
        lines.append(Text(f"no stage has begun: {status.preparing}"))
    names = max((len(stage.stage) for stage in status.stages), default=0)
    lines.append(Text())
    lines += [stage_line(status, stage, curves[stage.stage], names, ascii_only) for stage in status.stages]
    begun = [stage for stage in status.stages if stage.state != "waiting"]
    if begun:
        lines += [Text(), *details(begun[-1], curves[begun[-1].stage], width, ascii_only)]
    return lines


def driver_line(status: RunStatus) -> Text:
    if status.finished:
        return Text("finished", "green")
    if not status.driver_state:
        return Text("nobody works here")
    alive = status.driver_state == "alive"
    sign = (
        ""
        if status.driver_state == "ended"
        else f" (last sign of life {duration(status.driver_seconds)} ago)"
    )
    state = DRIVER[status.driver_state]
    return Text(f"{status.driver or 'a process'} {state}{sign}", "green" if alive else "red")


def shown_state(status: RunStatus, stage: StageStatus) -> str:
    """A key of `MARKS`: begun is running while somebody works on it."""
    if stage.state != "begun":
        return stage.state
    return "running" if status.driver_state == "alive" else "stopped"


def stage_line(status: RunStatus, stage: StageStatus, curves: Curves, names: int, ascii_only: bool) -> Text:
    """`▶ family  running   ████████············  38%  23 of 60  evaluating 3/16  1m02s left`."""
    state = shown_state(status, stage)
    sign, plain, colour = MARKS[state]
    head = f"{plain if ascii_only else sign} {stage.stage:<{names}}  {state:<7}"
    line = Text.assemble((head, colour))
    if state == "done":
        learned = gains_text(gains(curves.held_out, list(stage.held_out)))
        line.append(f"  {stage.steps:,} steps{': ' * bool(learned)}{learned}")
        return line
    share = stage.step / max(stage.steps, 1)
    full = round(share * BAR)
    bar = "#" * full + "." * (BAR - full) if ascii_only else "█" * full + "░" * (BAR - full)
    line.append(f"  {bar}  {share:4.0%}  {stage.step:,} of {stage.steps:,}")
    if state == "running":
        parts = [stage.doing, "" if stage.seconds_left is None else f"{duration(stage.seconds_left)} left"]
        line.append("".join(f"  {part}" for part in parts if part))
    return line


def details(stage: StageStatus, curves: Curves, width: int, ascii_only: bool) -> list[Text]:
    """Of a stage that is no longer waiting: a line a curve, probes, and what its workers do."""
    levels = ASCII_LEVELS if ascii_only else LEVELS
    lines = []
    longest = max(map(len, curves.loss), default=0)
    room = min(max(width - longest - 36, NARROW), WIDE)
    for student, losses in curves.loss.items():
        sums = [sum(by_term.values()) for p in curves.held_out if (by_term := terms(p.metrics, student))]
        for number, (what, values) in enumerate((("loss", losses), ("held-out", sums))):
            if values:
                name = f"{student if number == 0 else '':<{longest}}"
                ends = f"{values[0]:.3f} → {values[-1]:.3f}"
                lines.append(Text(f"  {name}  {what:<8}  {sparkline(values, room, levels)}  {ends}"))
        if student in stage.probes:
            lines.append(Text(f"  {'':<{longest}}  {'probes':<8}  {probes_text(stage.probes[student])}"))
    lines += [Text(f"  {stage.until}")] * bool(stage.until)
    facts = [f"checkpoint {checkpoint_text(stage)}"]
    if stage.workers:
        facts.append(f"{stage.workers} worker{'s' if stage.workers > 1 else ''}")
    if stage.tokens_per_second is not None:
        facts.append(f"{stage.tokens_per_second:,.0f} tokens/s")
    if stage.starts > 1:
        facts.append(f"restarts {stage.starts - 1}")
    if stage.heartbeat_seconds is not None:
        facts.append(f"heard of {duration(stage.heartbeat_seconds)} ago")
    return [*lines, Text(f"  {(', ' if ascii_only else ' · ').join(facts)}", "dim")]


def log_lines(status: RunStatus) -> list[str]:
    """The same in a line each for the driver and for every stage that is under way, without what changes by itself."""
    lines = [f"{status.recipe or 'a run'}: {status.preparing}"] if status.preparing else []
    if status.finished:
        return [f"{status.recipe}: finished"]
    if status.driver_state != "alive":
        lines.append(driver_line(status).plain.partition(" (last")[0])
    for stage in status.stages:
        state = shown_state(status, stage)
        if state in ("waiting", "done"):
            continue
        parts = [f"{stage.stage}  {state}  step {stage.step:,} of {stage.steps:,}"]
        parts += [f"{name} loss {value:.3f}" for name, value in stage.loss.items()]
        if stage.held_out:
            parts.append(f"held-out {held_out_text(stage)}")
        if state == "running" and stage.seconds_left is not None:
            parts.append(f"{duration(stage.seconds_left)} left")
        lines.append("  ".join(parts))
    return lines
