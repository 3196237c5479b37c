"""The verbs of `minilm data` and `minilm bench stream`: arguments in, one function of data/ a verb, a report out.

`verify-run` alone asks the loop's ledger: which rows a checkpoint was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.arguments import positive_whole
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from data.stream import Corpus


def add_data_verbs(data: argparse.ArgumentParser) -> None:
    verbs = data.add_subparsers(title="verbs", required=True, metavar="VERB")

    build = verbs.add_parser("build", help="turn text into shards of token rows")
    build.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="txt, json, jsonl, csv, parquet; also .gz .xz .zst"
    )
    build.add_argument("--text-field", help="the field that holds the text (default: the longest)")
    _add_building(build)
    build.set_defaults(run=build_data)

    imported = verbs.add_parser("import", help="turn token files of other programs into shards")
    imported.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="prefix of a .bin/.idx pair, or a tar or its URL"
    )
    imported.add_argument(
        "--from",
        dest="source",
        required=True,
        help="megatron, fairseq, fairseq-legacy, webdataset, or an installed plug-in",
    )
    imported.add_argument(
        "--source-tokenizer", help="the tokenizer that made the token ids (megatron, webdataset)"
    )
    imported.add_argument("--dict", help="fairseq's dict.txt")
    imported.add_argument(
        "--encoder", help="encoder.json, where the dictionary's symbols are numbers (fairseq)"
    )
    imported.add_argument(
        "--field", help="part of a sample that is read, as txt, json or tokens.npy (webdataset)"
    )
    imported.add_argument("--text-field", help="field of a json part (webdataset)")
    _add_building(imported)
    imported.set_defaults(run=import_tokens)

    verify = verbs.add_parser("verify", help="compare every byte with the manifest")
    verify.add_argument("data", metavar="DIR|URL")
    verify.add_argument("--threads", type=positive_whole)
    _add_json(verify)
    verify.set_defaults(run=verify_data)

    verify_run = verbs.add_parser(
        "verify-run", help="compare the rows that a checkpoint was trained on with the data set"
    )
    verify_run.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder or URL step-… of a stage's checkpoints"
    )
    verify_run.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="where its data sets lie now, in the recipe's order, if they moved",
    )
    _add_json(verify_run)
    verify_run.set_defaults(run=verify_run_verb)

    repair = verbs.add_parser("repair", help="replace damaged files, from a mirror or a new build")
    repair.add_argument("data", type=Path, metavar="DIR")
    repair.add_argument(
        "--mirror", metavar="DIR|URL", help="another copy of the data set (default: build it again)"
    )
    repair.add_argument("--text", nargs="+", help="where the text is now (default: where it was)")
    _add_json(repair)
    repair.set_defaults(run=repair_data)

    inspect = verbs.add_parser("inspect", help="a page of rows decoded, and what the tokens are like")
    inspect.add_argument("data", type=Path, metavar="DIR")
    inspect.add_argument("--page", type=int, default=0)
    inspect.add_argument("--rows-per-page", type=positive_whole, default=10)
    _add_json(inspect)
    inspect.set_defaults(run=inspect_data)

    convert = verbs.add_parser("convert", help="write tars with one record a row")
    convert.add_argument("data", type=Path, metavar="DIR")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--to", default="rows", help="rows")
    convert.set_defaults(run=convert_data)

    explain = verbs.add_parser("explain", help="the rows of a step: shard, block, row, first words")
    _add_order(explain)
    explain.add_argument("--step", type=int, required=True)
    explain.set_defaults(run=explain_step)

    where = verbs.add_parser("where", help="the step that reads a row")
    _add_order(where)
    where.add_argument("--row", type=int, required=True, help="counted over all data sets given")
    where.add_argument("--epoch", type=int, default=0)
    where.set_defaults(run=where_row)


def add_bench_stream(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--rows", type=positive_whole, default=200_000)
    bench.add_argument("--seq-len", type=positive_whole, default=512)
    bench.add_argument("--micro-batch", type=positive_whole, default=256)
    bench.add_argument("--seconds", type=float, default=1.0, help="for each reader and repeat")
    bench.add_argument("--repeats", type=positive_whole, default=3)
    _add_json(bench)
    bench.set_defaults(run=bench_stream_verb)


def _add_building(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer", required=True, help="the teacher's: a folder, package:NAME/PATH or a hub id"
    )
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--seq-len", type=int, default=512)
    verb.add_argument("--packing", choices=("full", "document"), default="full")
    verb.add_argument("--held-out", type=float, default=0.01, help="share of documents kept for measuring")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--processes", type=int, help="default: the number of cores")
    verb.add_argument(
        "--ray", action="store_true", help="on the Ray cluster that RAY_ADDRESS names or runs here"
    )


def _add_order(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "data", nargs="+", metavar="DIR|URL[=WEIGHT]", help="a data set, or several with weights"
    )
    verb.add_argument("--batch", type=int, required=True)
    verb.add_argument("--seed", type=int, required=True)
    verb.add_argument("--window", type=int, metavar="SHARDS", help="shuffle by windows (default: fully)")
    _add_json(verb)


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="for programs")


def _tell(report: Any, options: argparse.Namespace) -> None:
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text())


def build_data(options: argparse.Namespace) -> int:
    from orchestrator.inputs import text_inputs

    return _import(options, text_inputs(options.inputs), "text", {"text_field": options.text_field})


def import_tokens(options: argparse.Namespace) -> int:
    names = ("source_tokenizer", "dict", "encoder", "field", "text_field")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "source_tokenizer" in given:
        from orchestrator.inputs import tokenizer_name

        given["source_tokenizer"] = tokenizer_name(given["source_tokenizer"])
    return _import(options, options.inputs, options.source, given)


def _import(options: argparse.Namespace, inputs: Any, source: str, given: dict[str, Any]) -> int:
    from data.build import import_data
    from orchestrator.inputs import tokenizer_name
    from orchestrator.progress import Line, build_reporter
    from orchestrator.signals import StopRequest

    line = Line()
    with StopRequest() as stop:
        report = import_data(
            inputs,
            tokenizer_name(options.tokenizer),
            options.out,
            source=source,
            options=given,
            seq_len=options.seq_len,
            packing=options.packing,
            held_out=options.held_out,
            seed=options.seed,
            processes=options.processes,
            progress=build_reporter(line, stop),
            on_ray=options.ray,
        )
    line.close()
    print(report.text())
    return 0


def verify_data(options: argparse.Namespace) -> int:
    from data.verify import verify
    from orchestrator.progress import Line

    line = Line()
    report = verify(
        options.data,
        threads=options.threads,
        progress=lambda done, total: line.show(f"verifying  {done / max(total, 1):.0%}"),
    )
    line.close()
    _tell(report, options)
    return 0 if report.whole else UserError.exit_code


def verify_run_verb(options: argparse.Namespace) -> int:
    from orchestrator.ledger import verify_run
    from orchestrator.progress import Line

    line = Line()
    check = verify_run(
        options.checkpoint,
        options.data,
        lambda done, steps: line.show(f"reading the run's rows again  {done / max(steps, 1):.0%}"),
    )
    line.close()
    _tell(check, options)
    return 0 if check.sound else UserError.exit_code


def repair_data(options: argparse.Namespace) -> int:
    from data.care import repair
    from orchestrator.inputs import text_inputs

    inputs = text_inputs(options.text) if options.text else None
    _tell(repair(options.data, mirror=options.mirror, inputs=inputs), options)
    return 0


def inspect_data(options: argparse.Namespace) -> int:
    from data.look import inspect

    _tell(inspect(options.data, page=options.page, rows_per_page=options.rows_per_page), options)
    return 0


def convert_data(options: argparse.Namespace) -> int:
    from data.care import convert

    print(convert(options.data, options.out, to=options.to).text())
    return 0


def explain_step(options: argparse.Namespace) -> int:
    from data.look import explain

    source = _corpora(options.data)
    order = {"batch": options.batch, "seed": options.seed, "window": options.window}
    _tell(explain(source, step=options.step, **order), options)
    return 0


def where_row(options: argparse.Namespace) -> int:
    from data.look import where

    source = _corpora(options.data)
    order = {"batch": options.batch, "seed": options.seed, "window": options.window}
    _tell(where(source, row=options.row, epoch=options.epoch, **order), options)
    return 0


def _corpora(given: list[str]) -> list[Corpus]:
    """`DIR|URL` or `DIR|URL=WEIGHT` each; a folder whose name holds `=` is taken as it is."""
    from data.opening import open_corpora
    from orchestrator.corpora import cache_folder
    from orchestrator.data_job import CacheJob

    places: list[tuple[str | Path, float]] = []
    for text in given:
        place, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            places.append((text, 1.0))
            continue
        try:
            places.append((place, float(weight)))
        except ValueError:
            raise UserError(f"{text!r}: a weight is a number, as in {place}=0.7") from None
    return open_corpora(places, cache=cache_folder(CacheJob()))


def bench_stream_verb(options: argparse.Namespace) -> int:
    from data.bench_stream import bench_stream

    print("making rows and timing every reader …", file=sys.stderr)
    report = bench_stream(
        rows=options.rows,
        seq_len=options.seq_len,
        micro_batch=options.micro_batch,
        seconds=options.seconds,
        repeats=options.repeats,
    )
    _tell(report, options)
    return 0
