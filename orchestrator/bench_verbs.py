"""`minilm bench loss` and `minilm bench step`: arguments in, a table or JSON lines out. The benches are in model/."""

from __future__ import annotations

import argparse

from orchestrator.data_verbs import add_bench_stream


def add_bench_verbs(bench: argparse.ArgumentParser) -> None:
    """Add the verbs `loss`, `step` and `stream`; each sets `run`, a function of the parsed options."""
    verbs = bench.add_subparsers(title="verbs", required=True, metavar="VERB")
    add_bench_stream(verbs.add_parser("stream", help="rows a second, against memcpy and other readers"))
    loss = verbs.add_parser("loss", help="one relation's divergence: whole maps, tiles, fused kernels")
    loss.add_argument("--heads-of", default="64,32", metavar="T,S", help="head sizes of teacher and student")
    _add_common(loss)
    loss.set_defaults(run=bench_loss)
    step = verbs.add_parser("step", help="whole training steps, against the way they are written by hand")
    step.add_argument("--teacher", default="12x768", metavar="LxH", help="layers x hidden size")
    step.add_argument(
        "--students", default="6x384", metavar="LxH,…", help="several share one teacher pass too"
    )
    step.add_argument("--ways", default="by-hand,ours", help="of by-hand, ours, ours-compiled")
    _add_common(step)
    step.set_defaults(run=bench_step)


def bench_loss(options: argparse.Namespace) -> int:
    from model.bench import bench_loss

    teacher_size, student_size = (int(size) for size in options.heads_of.split(","))
    rows = bench_loss(teacher_size=teacher_size, student_size=student_size, **_common(options))
    return _print(rows, options.json)


def bench_step(options: argparse.Namespace) -> int:
    from model.bench import Size, bench_step

    students = [Size.parse(size) for size in options.students.split(",")]
    teacher, ways = Size.parse(options.teacher), options.ways.split(",")
    rows = bench_step(teacher=teacher, students=students, ways=ways, **_common(options))
    return _print(rows, options.json)


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--batch", type=int, default=8)
    verb.add_argument("--tokens", type=int, default=512)
    verb.add_argument("--heads", type=int, default=12)
    verb.add_argument("--repeats", type=int, default=5)
    verb.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    verb.add_argument("--json", action="store_true", help="one JSON object a row instead of a table")


def _common(options: argparse.Namespace) -> dict:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    return {
        "batch": options.batch,
        "tokens": options.tokens,
        "heads": options.heads,
        "repeats": options.repeats,
        "device": device,
        "dtype": getattr(torch, dtype),
    }


def _print(rows: list, as_json: bool) -> int:
    from model.bench import json_lines, table

    print(json_lines(rows) if as_json else table(rows))
    return 0
