"""The verbs of `minilm bench`: arguments in, a table or JSON lines out. `bench/` does the measuring."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilm.orchestrator.system.text import text_table
from minilm.orchestrator.verbs.arguments import (
    add_json,
    add_overrides,
    add_verb,
    add_verbs,
    positive_whole,
    print_report,
)


def add_bench_verbs(bench: argparse.ArgumentParser) -> None:
    """Add the verbs; each sets `run`, a function of the parsed options."""
    verbs = add_verbs(bench)
    _add_stream(
        add_verb(
            verbs,
            "stream",
            "measure rows a second, compared with memcpy and other readers",
            "minilm bench stream --rows 50000 --repeats 2",
        )
    )
    loss = add_verb(
        verbs,
        "loss",
        "measure one relation's divergence: whole maps, tiles, fused kernels",
        "minilm bench loss --batch 8 --tokens 512",
    )
    loss.add_argument("--heads-of", default="64,32", metavar="T,S", help="head sizes of teacher and student")
    _add_common(loss)
    loss.set_defaults(run=bench_loss)
    step = add_verb(
        verbs,
        "step",
        "measure whole training steps, compared with hand-written ones",
        "minilm bench step --students 6x384,4x384,3x384 --ways ours --micro-batches 8",
        "minilm bench step --against minilmv2.bb,bertdistiller",
    )
    step.add_argument("--teacher", default="12x768", metavar="LxH", help="layers x hidden size")
    step.add_argument(
        "--students",
        default="6x384",
        metavar="LxH,…",
        help="several are measured alone and on one shared teacher pass",
    )
    step.add_argument(
        "--micro-batches", type=positive_whole, default=1, help="micro-batches of --batch rows in a step"
    )
    step.add_argument("--ways", default="by-hand,ours", help="some of by-hand, ours, ours-compiled")
    step.add_argument(
        "--against",
        metavar="PEER,…",
        help="before them, how published projects compute it: some of minilmv2.bb, bertdistiller, paddlenlp",
    )
    step.add_argument(
        "--objective",
        choices=("minilm", "minilmv2"),
        help="that all ways compute (default: minilm; with --against minilmv2, which those projects publish)",
    )
    step.add_argument(
        "--deterministic",
        action="store_true",
        help="use the kernels of gradient_sum: exact on a GPU; run with and without to compare",
    )
    _add_common(step)
    step.set_defaults(run=bench_step)
    sums = add_verb(
        verbs,
        "gradient-sum",
        "measure exact and fast sums of gradients: time and error",
        "minilm bench gradient-sum --parameters 33000000",
    )
    sums.description = "Under torchrun (-m minilm bench gradient-sum …) the sum over workers is measured too."
    sums.add_argument("--parameters", type=positive_whole, default=33_000_000)
    sums.add_argument(
        "--micro-batches", type=positive_whole, default=8, help="micro-batches in a worker's step"
    )
    sums.add_argument("--rounds", type=positive_whole, default=5, help="times are medians of these")
    _add_machine(sums)
    sums.set_defaults(run=bench_gradient_sum)
    save = add_verb(
        verbs,
        "save",
        "measure how long a checkpoint holds the loop up, and how long writing takes",
        "minilm bench save runs/mine/stages/small/stage.json",
    )
    save.add_argument(
        "stage", type=Path, metavar="STAGE.json", help="in the folder of a stage that was started"
    )
    save.add_argument("--rounds", type=positive_whole, default=5, help="times are medians of these")
    _add_machine(save)
    save.set_defaults(run=bench_save)
    overhead = add_verb(
        verbs,
        "overhead",
        "measure what Ray and tracking add to the loop alone",
        "minilm bench overhead recipes/quickstart.yaml --set stages.student.steps=2000",
    )
    overhead.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="its first stage is run")
    add_overrides(overhead)
    overhead.add_argument(
        "--steps", type=positive_whole, default=10, help="steps in a turn, which should take some seconds"
    )
    overhead.add_argument(
        "--starts",
        type=positive_whole,
        default=2,
        help="how often each way is started: two equal runs differ too",
    )
    overhead.add_argument(
        "--rounds", type=positive_whole, default=10, help="turns that each way has after a start"
    )
    overhead.add_argument("--json", action="store_true", help="one JSON object a row instead of a table")
    overhead.set_defaults(run=bench_overhead)


def _add_stream(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--rows", type=positive_whole, default=200_000)
    bench.add_argument("--seq-len", type=positive_whole, default=512)
    bench.add_argument("--micro-batch", type=positive_whole, default=256)
    bench.add_argument("--seconds", type=float, default=1.0, help="for each reader and repeat")
    bench.add_argument("--repeats", type=positive_whole, default=3)
    add_json(bench)
    bench.set_defaults(run=bench_stream_verb)


def bench_stream_verb(options: argparse.Namespace) -> int:
    from minilm.orchestrator.bench.stream import bench_stream

    if not options.quiet:
        print("making rows and timing every reader …", file=sys.stderr)
    report = bench_stream(
        rows=options.rows,
        seq_len=options.seq_len,
        micro_batch=options.micro_batch,
        seconds=options.seconds,
        repeats=options.repeats,
    )
    print_report(report, options)
    return 0


def bench_loss(options: argparse.Namespace) -> int:
    from minilm.orchestrator.bench.loss import bench_loss

    teacher_size, student_size = (int(size) for size in options.heads_of.split(","))
    rows = bench_loss(teacher_size=teacher_size, student_size=student_size, **_common(options))
    return _print(rows, options.json)


def bench_step(options: argparse.Namespace) -> int:
    from minilm.orchestrator.bench.step import Size, bench_step
    from minilm.orchestrator.train.build import compute_deterministically

    if options.deterministic:  # before the first kernel
        compute_deterministically()
    students = [Size.parse(size) for size in options.students.split(",")]
    sizes = {
        "teacher": Size.parse(options.teacher),
        "students": students,
        "micro_batches": options.micro_batches,
    }
    peers = options.against.split(",") if options.against else []
    ways = list(dict.fromkeys([*peers, *options.ways.split(",")]))
    objective = options.objective or ("minilmv2" if peers else "minilm")
    rows = bench_step(**sizes, ways=ways, objective=objective, **_common(options))
    return _print(rows, options.json)


def bench_gradient_sum(options: argparse.Namespace) -> int:
    """Measure alone or, under torchrun, as one worker of several."""
    from minilm.orchestrator.bench.loop_parts import gradient_sum_rows
    from minilm.orchestrator.train.distributed import join_world

    with join_world(_device(options), options.threads) as world:
        rows = gradient_sum_rows(
            world, parameters=options.parameters, micro_batches=options.micro_batches, rounds=options.rounds
        )
    if not world.is_rank_zero:
        return 0
    if options.json:
        return _print_json(rows)
    lines = [("sum", "ms a micro-batch", "ms to finish", "bytes a parameter", "error")]
    for row in rows:
        times = f"{row.add_ms:.2f}", f"{row.finish_ms:.2f}"
        lines.append((row.gradient_sum, *times, f"{row.bytes_a_parameter:.1f}", f"{row.error:.1e}"))
    print(text_table(lines))
    return 0


def bench_save(options: argparse.Namespace) -> int:
    import tempfile

    import torch

    from minilm.orchestrator.bench.loop_parts import save_row
    from minilm.orchestrator.stage.spec import StageSpec

    spec = StageSpec.from_json(options.stage.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=options.stage.parent, prefix=".bench-") as folder:
        row = save_row(spec, Path(folder), torch.device(_device(options)), rounds=options.rounds)
    if options.json:
        return _print_json([row])
    print(
        f"{row.megabytes:,.0f} MB ({row.parameters:,} trained parameters): the loop stands still for "
        f"{row.stall_ms:.0f} ms ({row.stall_cpu_ms:.0f} ms of processor time), "
        f"the thread writes for {row.write_seconds:.1f} s "
        f"({row.write_cpu_seconds:.2f} s of processor time)\n"
        f"of a loop that saves every {row.every_seconds:g} s: {row.share:.2%}; "
        f"{row.share_at_most:.2%} if no core is idle"
    )
    return 0


def bench_overhead(options: argparse.Namespace) -> int:
    from minilm.orchestrator.bench.overhead import overhead_rows
    from minilm.orchestrator.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else stopped runs would be left over
    times = {"starts": options.starts, "rounds": options.rounds, "steps": options.steps}
    rows = overhead_rows(recipe, options.recipe, options.set, **times)
    if options.json:
        return _print_json(rows)
    lines = [("way", "clock ms", "over worker (quartiles)", "processor ms", "over worker (quartiles)")]
    for row in rows:
        clock = f"{row.wall_ms:.1f}", spread(row.wall_over, row.wall_quartiles)
        lines.append((row.way, *clock, f"{row.cpu_ms:.1f}", spread(row.cpu_over, row.cpu_quartiles)))
    print(text_table(lines))
    return 0


def spread(median: float, quartiles: tuple[float, float]) -> str:
    return f"{median:+.1%} ({quartiles[0]:+.1%} to {quartiles[1]:+.1%})"


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--batch", type=positive_whole, default=8)
    verb.add_argument("--tokens", type=positive_whole, default=512)
    verb.add_argument("--heads", type=positive_whole, default=12)
    verb.add_argument("--repeats", type=positive_whole, default=5)
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    _add_machine(verb)


def _add_machine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--threads", type=positive_whole, help="CPU threads (default: PyTorch's)")
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    verb.add_argument("--json", action="store_true", help="one JSON object a row instead of a table")


def _device(options: argparse.Namespace) -> str:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _common(options: argparse.Namespace) -> dict:
    import torch

    device = _device(options)
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    return {
        "batch": options.batch,
        "tokens": options.tokens,
        "heads": options.heads,
        "repeats": options.repeats,
        "device": device,
        "dtype": getattr(torch, dtype),
    }


def _print_json(rows: Sequence[Any]) -> int:
    print("\n".join(json.dumps(asdict(row)) for row in rows))
    return 0


def _print(rows: list, as_json: bool) -> int:
    from minilm.orchestrator.bench.loss import json_lines, table

    print(json_lines(rows) if as_json else table(rows))
    return 0
