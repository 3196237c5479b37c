"""`minilm plan`: what a recipe will cost, as a table or JSON lines. `minilm rehearse`: the same, tried."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.launch.base import LAUNCHERS
from minilm.orchestrator.verbs.arguments import (
    add_json,
    add_overrides,
    add_recipe,
    add_verb,
    positive,
    positive_whole,
    print_report,
)

if TYPE_CHECKING:
    from minilm.orchestrator.plan.cost import Machine, Work
    from minilm.orchestrator.recipe.schema import Recipe


def add_plan(verbs: Any) -> None:
    plan = add_verb(
        verbs,
        "plan",
        "say what a recipe will cost, before anything runs",
        "minilm plan recipes/quickstart.yaml --measure",
        "minilm plan mine.yaml --hardware h100x8",
        "minilm plan mine.yaml --tokens-per-second 40000 --stage small --interconnect 12.5",
    )
    add_recipe(plan)
    add_overrides(plan)
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument(
        "--tokens-per-second", type=positive, metavar="X", help="of one worker in one stage, as measured"
    )
    speed.add_argument(
        "--measure",
        action="store_true",
        help="time a few steps of one stage on this machine, weights at random",
    )
    speed.add_argument(
        "--hardware",
        metavar="DEVICExN",
        help="reckon with a data sheet's peak, as h100x8; see --share-of-peak",
    )
    plan.add_argument("--stage", metavar="NAME", help="the stage that the rate is of (default: the first)")
    plan.add_argument(
        "--share-of-peak",
        type=positive,
        metavar="X",
        help="of --hardware that a step reaches (default: 0.25)",
    )
    plan.add_argument(
        "--interconnect",
        type=positive,
        metavar="GB/S",
        help="between workers (default: 1, or that of --hardware)",
    )
    plan.add_argument(
        "--seq-len", type=positive_whole, metavar="TOKENS", help="a row, where the data set is not here"
    )
    plan.add_argument(
        "--json", action="store_true", help="print one JSON object a stage, then one for the whole"
    )
    plan.set_defaults(run=plan_recipe)


def add_rehearse(verbs: Any) -> None:
    rehearse = add_verb(
        verbs,
        "rehearse",
        "try a recipe for a few steps a stage, with a kill, in a scratch folder",
        "minilm rehearse mine.yaml",
        "minilm rehearse mine.yaml --minutes 10 --set compute.workers=8 --address HEAD:6379",
    )
    add_recipe(rehearse)
    add_overrides(rehearse)
    rehearse.add_argument(
        "--minutes", type=positive, default=30.0, metavar="N", help="it ends after so many (default: 30)"
    )
    rehearse.add_argument(
        "--workdir",
        type=Path,
        help="the real run's, whose data set and teachers are read; scratch lies beside it (default: runs/NAME)",
    )
    rehearse.add_argument("--launcher", choices=tuple(LAUNCHERS), default="ray")
    rehearse.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, else a local cluster)")
    rehearse.add_argument("--keep", action="store_true", help="leave the scratch folder there")
    add_json(rehearse)
    rehearse.set_defaults(run=rehearse_recipe)


def rehearse_recipe(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    from minilm.orchestrator.driver.rehearsal.rehearse import check, rehearse, scratch_folder
    from minilm.orchestrator.driver.status_line import StatusLine
    from minilm.orchestrator.driver.workdir import Workdir, default_workdir
    from minilm.orchestrator.recipe.load import load_recipe
    from minilm.orchestrator.system.signals import StopRequest

    recipe = load_recipe(options.recipe, options.set)
    real = Workdir((options.workdir or default_workdir(recipe.name)).resolve())
    arguments = ["--launcher", options.launcher, *(("--address", options.address) if options.address else ())]
    with StopRequest() as stop, scratch_folder(real, recipe.name, keep=options.keep) as scratch:
        report, ended = rehearse(
            recipe,
            real,
            scratch,
            arguments,
            StatusLine(quiet=options.quiet),
            stop=stop,
            deadline=deadline,
            assumed=assumed(recipe),
            keep=options.keep,
        )
    if ended.exit_code != UserError.exit_code:
        print_report(report, options)
    check(report, ended, options.minutes)
    return 0


def plan_recipe(options: argparse.Namespace) -> int:
    from minilm.orchestrator.plan.advice import advice
    from minilm.orchestrator.plan.cost import plan
    from minilm.orchestrator.plan.estimate import planned_stages, works
    from minilm.orchestrator.plan.hardware import parse_hardware
    from minilm.orchestrator.plan.reading import reading
    from minilm.orchestrator.plan.report import as_json, table, whole, whole_as_json
    from minilm.orchestrator.recipe.load import load_recipe
    from minilm.orchestrator.resolve.workers import workers_of

    recipe = load_recipe(options.recipe, options.set)
    device, precision = assumed(recipe, hardware=options.hardware)
    least, most, _ = workers_of(recipe)
    workers = parse_hardware(options.hardware)[1] if options.hardware else most
    all_work = works(recipe, options.seq_len, device, precision)
    machine = machine_of(options, recipe, all_work, device, precision)
    plans = []
    for work in all_work:
        numbers = {
            1,
            least,
            most,
            workers,
            work.micro_batches,
            *(2**n for n in range(work.micro_batches.bit_length())),
        }
        plans.append(plan(work, machine, sorted(numbers)))
    data = reading(recipe)
    length = all_work[0].seq_len
    warnings = advice(recipe, planned_stages(recipe, length), data, length)
    useful = min(workers, *(work.micro_batches for work in all_work))
    if options.json:
        print("\n".join(json.dumps(as_json(one)) for one in plans))
        print(json.dumps(whole_as_json(plans, machine, useful, data) | {"warnings": warnings}))
    else:
        print("\n\n".join(table(one, machine) for one in plans))
        print(f"\n{whole(plans, machine, workers, most, data)}")
        for warning in warnings:
            print(f"  warning       {warning}")
    return 0


def assumed(recipe: Recipe, *, hardware: str | None = None) -> tuple[str, str]:
    """The device and precision that the plan is for."""
    import torch

    from minilm.orchestrator.train.numerics import choose_precision

    compute = recipe.compute
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if hardware and compute.device == "cpu":
        raise UserError(
            "--hardware is of CUDA devices, and compute.device is cpu; add --set compute.device=cuda"
        )
    device = "cuda" if hardware else here if compute.device == "auto" else compute.device
    if device == "cuda" and compute.precision == "auto":  # of another machine, perhaps
        return device, "bfloat16"
    return device, choose_precision(compute.precision, None, torch.device(device))


def machine_of(
    options: argparse.Namespace, recipe: Recipe, works: list[Work], device: str, precision: str
) -> Machine:
    """The device, with the rate that the options give, measure or reckon, if any."""
    import torch

    from minilm.orchestrator.plan.cost import Machine, flops_per_second
    from minilm.orchestrator.plan.hardware import machine_by_sheet, parse_hardware

    names = [work.stage for work in works]
    if options.stage not in (None, *names):
        raise UserError(f"--stage: given {options.stage!r}; allowed: {', '.join(names)}")
    if options.share_of_peak and not (options.hardware and options.share_of_peak <= 1):
        raise UserError("--share-of-peak: allowed: a number up to 1, with --hardware")
    work = works[names.index(options.stage or names[0])]
    link = (options.interconnect or 1.0) * 1e9
    if options.hardware:
        name, _ = parse_hardware(options.hardware)
        own_link = link if options.interconnect else None
        machine = machine_by_sheet(name, precision, share=options.share_of_peak, bandwidth=own_link)
        return replace(machine, source=f"{machine.source} (--share-of-peak)")
    rate, source = (
        options.tokens_per_second,
        f"{options.tokens_per_second or 0:g} tokens/s in stage {work.stage}, as given",
    )
    if options.measure and (device == "cpu" or torch.cuda.is_available()):
        from minilm.orchestrator.bench.stage_rate import stage_tokens_per_second

        rate = stage_tokens_per_second(recipe, work, torch.device(device), precision)
        source = f"{rate:,.0f} tokens/s in stage {work.stage}, measured here on one worker"
    elif options.measure:
        source = (
            "the recipe asks for cuda, and this machine has no CUDA device to measure; a CPU's rate would say nothing. "
            "Add --hardware h100x8, or --tokens-per-second X of such a device"
        )
    elif not rate:
        source = "add --hardware h100x8, --tokens-per-second X, or --measure on the machine that will run it"
    reached = flops_per_second(work, rate) if rate else 0.0
    return Machine(reached, device, precision, source=source, bandwidth=link)
