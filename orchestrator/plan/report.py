"""A plan as a table for people or as plain values for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from minilm.orchestrator.plan.cost import Machine, Plan
from minilm.orchestrator.plan.reading import Corpus, Reading
from minilm.orchestrator.system.text import duration


def as_json(found: Plan) -> dict[str, Any]:
    values = asdict(found)
    values["flops_a_token"]["total"] = found.flops_a_token.total
    values["memory"] |= {"device": found.memory.device, "total": found.memory.total}
    return values


def whole_as_json(plans: Sequence[Plan], machine: Machine, workers: int, data: Reading) -> dict[str, Any]:
    """The whole recipe with so many workers; seconds are None where no speed is known."""
    return {
        "workers": workers,
        "flops": sum(one.flops for one in plans),
        "seconds": total_seconds(plans, workers),
        "tokenizing_seconds": data.seconds,
        "machine": asdict(machine),
        "epochs": {
            one.work.stage: {corpus.name: epochs(one, corpus) for corpus in data.corpora} for one in plans
        },
    }


def total_seconds(plans: Sequence[Plan], workers: int) -> float | None:
    times = [one.seconds(workers) for one in plans]
    return None if None in times else sum(time for time in times if time is not None)


def epochs(found: Plan, corpus: Corpus) -> float:
    """How often a stage reads the corpus."""
    return found.work.steps * found.work.batch * corpus.share / max(corpus.rows, 1)


def table(found: Plan, machine: Machine) -> str:
    """The plan of a stage in lines for people."""
    work, flops, memory = found.work, found.flops_a_token, found.memory
    program = f", program and freed memory about {size(memory.program)}" if memory.program else ""
    lines = [
        f"stage {work.stage}: {'at most ' if work.until else ''}{work.steps:,} steps of {work.batch} x {work.seq_len} "
        f"tokens = {found.tokens:,} tokens",
        f"  operations    {found.flops:.2e} FLOP; MFLOP a token: teacher {flops.teacher / 1e6:.1f}, "
        f"students {flops.students / 1e6:.1f}, relations {flops.relations / 1e6:.1f}",
        f"  parameters    teacher {work.teacher.parameters:,}, students "
        + ", ".join(f"{s.parameters:,} ({s.trained:,} trained)" for s in work.students),
        f"  memory        about {size(memory.total)} a worker: teacher {size(memory.teacher)}, students "
        f"{size(memory.students)}, moments {size(memory.moments)}, gradients {size(memory.sums)}, "
        f"activations about {size(memory.activations)}{program}; the main one {size(memory.save_copy)} of host memory "
        f"more",
        f"  checkpoints   {size(found.checkpoint)} each, {size(found.stored)} at the end",
    ]
    if 0 < machine.memory < memory.device:
        lines.append(
            f"  too much      the device has {size(machine.memory)}; a smaller micro_batch than {work.micro_batch} fits"
        )
    known = machine.flops_per_second > 0
    lines.append(
        "  workers  micro-batches each" + ("  seconds a step  stage takes  efficiency" if known else "")
    )
    for row in found.scaling:
        time = ""
        if row.seconds is not None and row.efficiency is not None:
            time = f"{row.seconds:>16.3g}{long(row.seconds * work.steps):>13}{row.efficiency:>12.0%}"
        lines.append(f"  {row.workers:>7}{row.micro_batches:>20}{time}")
    lines.append(
        f"  more than {work.micro_batches} workers are refused: a step has {work.micro_batches} micro-batches of "
        f"{work.micro_batch} rows; a smaller micro_batch makes room for more"
    )
    return "\n".join(lines)


def whole(plans: Sequence[Plan], machine: Machine, workers: int, recipe_workers: int, data: Reading) -> str:
    """The whole recipe with so many workers, or the most that all stages have work for; what was assumed, and what is
    known of its data."""
    smallest = min(plans, key=lambda one: one.work.micro_batches).work
    asked, workers = workers, min(workers, smallest.micro_batches)
    seconds = total_seconds(plans, workers)
    flops = sum(one.flops for one in plans)
    lines = [f"all {len(plans)} stages: {flops:.2e} FLOP" if len(plans) > 1 else f"in all: {flops:.2e} FLOP"]
    if seconds is None:
        lines.append(f"  time          unknown: {machine.source}")
    else:
        stages = ", ".join(f"{one.work.stage} {long(one.seconds(workers) or 0)}" for one in plans)
        most = "at most " if any(one.work.until for one in plans) else ""
        lines += [
            f"  time          {most}{long(seconds)} with {workers} worker{'s' if workers > 1 else ''}, without "
            f"measuring and saving: {stages}",
            f"  rate          {machine.source}: {machine.flops_per_second / 1e9:,.0f} GFLOP/s, taken for every stage",
        ]
    if workers < asked:
        lines.append(
            f"  workers       {workers} of {asked}: a step of stage {smallest.stage} has no work for more; a smaller "
            f"micro_batch than {smallest.micro_batch} makes some"
        )
    elif workers != recipe_workers:
        lines.append(f"  workers       the recipe asks for {recipe_workers}; --set compute.workers={workers}")
    lines.append(
        f"  assumed       {machine.device} in {machine.precision}, {machine.bandwidth / 1e9:g} GB/s between workers"
    )
    for corpus in data.corpora:
        about = "about " if corpus.estimated else ""
        read = ", ".join(f"{one.work.stage} {epochs(one, corpus):.2g}" for one in plans)
        lines.append(f"  epochs        over {about}{corpus.rows:,.0f} rows of {corpus.name}: {read}")
    if data.seconds:
        lines.append(
            f"  tokenizing    about {long(data.seconds)} for {size(data.num_bytes)} of text with {data.processes} "
            f"processes here, once"
        )
    return "\n".join(lines)


def long(seconds: float) -> str:
    """`90` → `1m30s`, and from two days on in days."""
    return duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"


def size(num_bytes: float) -> str:
    """`1234567` → `1.2 MB`."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
