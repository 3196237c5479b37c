"""A plan as a table for people or as plain values for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from minilm.orchestrator.plan.cost import Machine, Plan
from minilm.orchestrator.system.text import duration


def as_json(found: Plan) -> dict[str, Any]:
    values = asdict(found)
    values["flops_a_token"]["total"] = found.flops_a_token.total
    values["memory"]["device"] = found.memory.device
    return values


def table(found: Plan, machine: Machine) -> str:
    """The plan in lines for people."""
    work, flops, memory = found.work, found.flops_a_token, found.memory
    lines = [
        f"stage {work.stage}: {work.steps:,} steps of {work.batch} x {work.seq_len} tokens = {found.tokens:,} tokens",
        f"  operations    {found.flops:.2e} FLOP; MFLOP a token: teacher {flops.teacher / 1e6:.1f}, "
        f"students {flops.students / 1e6:.1f}, relations {flops.relations / 1e6:.1f}",
        f"  parameters    teacher {work.teacher.parameters:,}, students "
        + ", ".join(f"{s.parameters:,} ({s.trained:,} trained)" for s in work.students),
        f"  memory        about {size(memory.device)} a worker: teacher {size(memory.teacher)}, students "
        f"{size(memory.students)}, moments {size(memory.moments)}, gradients {size(memory.sums)}, "
        f"activations about {size(memory.activations)}; the main one {size(memory.save_copy)} of host memory more",
        f"  checkpoints   {size(found.checkpoint)} each, {size(found.stored)} at the end",
    ]
    known = found.scaling[0].seconds > 0
    if not known:
        lines.append(
            "  time          unknown; add --tokens-per-second X, or --measure on the machine that will run it"
        )
    elif machine.flops_per_second:
        lines.append(
            f"  time          from {machine.flops_per_second / 1e9:,.0f} GFLOP/s of matrix products here, of which a "
            f"step is taken to reach {machine.share_of_peak:.0%}"
        )
    lines.append(
        "  workers  micro-batches each" + ("  seconds a step  stage takes" if known else "") + "  efficiency"
    )
    for row in found.scaling:
        time = f"{row.seconds:>16.3g}{duration(found.seconds(row.workers)):>13}" if known else ""
        lines.append(f"  {row.workers:>7}{row.micro_batches:>20}{time}{row.efficiency:>12.0%}")
    lines.append(
        f"  more than {work.micro_batches} workers are refused: a step has {work.micro_batches} micro-batches of "
        f"{work.micro_batch} rows; a smaller micro_batch makes room for more"
    )
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """`1234567` → `1.2 MB`."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
