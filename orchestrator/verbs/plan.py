"""`minilm plan`: what a recipe will cost, as a table or JSON lines."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.verbs.arguments import add_overrides, add_recipe, add_verb, positive, positive_whole

if TYPE_CHECKING:
    from minilm.orchestrator.plan.cost import Machine


def add_plan(verbs: Any) -> None:
    plan = add_verb(
        verbs,
        "plan",
        "say what a recipe will cost, before anything runs",
        "minilm plan recipes/quickstart.yaml --measure",
        "minilm plan mine.yaml --tokens-per-second 40000 --interconnect 12.5",
    )
    add_recipe(plan)
    add_overrides(plan)
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--tokens-per-second", type=positive, metavar="X", help="of one worker, as measured")
    speed.add_argument(
        "--measure", action="store_true", help="take this machine's matrix products as a measure"
    )
    plan.add_argument(
        "--interconnect", type=positive, default=1.0, metavar="GB/S", help="between workers (default: 1)"
    )
    plan.add_argument(
        "--seq-len", type=positive_whole, metavar="TOKENS", help="a row, where the data set is not here"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object a stage")
    plan.set_defaults(run=plan_recipe)


def plan_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.plan.cost import plan
    from minilm.orchestrator.plan.estimate import works
    from minilm.orchestrator.plan.report import as_json, table
    from minilm.orchestrator.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    machine = machine_of(options)
    least, most = recipe.compute.workers
    plans = []
    for work in works(recipe, options.seq_len):
        numbers = {least, most, *(2**n for n in range(work.micro_batches.bit_length()))}
        plans.append(plan(work, machine, sorted(numbers | {work.micro_batches})))
    if options.json:
        print("\n".join(json.dumps(as_json(one)) for one in plans))
    else:
        print("\n\n".join(table(one, machine) for one in plans))
    return 0


def machine_of(options: argparse.Namespace) -> Machine:
    from minilm.orchestrator.plan.cost import Machine

    network = {"bandwidth": options.interconnect * 1e9}
    if options.tokens_per_second:
        return Machine(tokens_per_second=options.tokens_per_second, **network)
    if options.measure:
        import torch

        from minilm.orchestrator.bench.loss import matmul_peak

        device = "cuda" if torch.cuda.is_available() else "cpu"
        peak = matmul_peak(device, torch.bfloat16 if device == "cuda" else torch.float32)
        return Machine(flops_per_second=peak, **network)
    return Machine(**network)
