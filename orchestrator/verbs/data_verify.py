"""`minilm data verify`, `repair`, `inspect` and `convert`: what can be done with a built data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_json, add_verb, positive_whole, print_report


def add_verify(verbs: Any) -> None:
    verify = add_verb(
        verbs,
        "verify",
        "compare every byte with the manifest",
        "minilm data verify books",
        "minilm data verify s3://bucket/books --json",
    )
    verify.add_argument("data", metavar="DIR|URL")
    verify.add_argument("--threads", type=positive_whole)
    add_json(verify)
    verify.set_defaults(run=verify_data)


def add_repair(verbs: Any) -> None:
    repair = add_verb(
        verbs,
        "repair",
        "replace damaged files, from a mirror or a new build",
        "minilm data repair books --mirror s3://bucket/books",
        "minilm data repair books --text corpus/*.txt",
    )
    repair.add_argument("data", type=Path, metavar="DIR")
    repair.add_argument(
        "--mirror", metavar="DIR|URL", help="another copy of the data set (default: build it again)"
    )
    repair.add_argument("--text", nargs="+", help="where the text is now (default: where it was)")
    add_json(repair)
    repair.set_defaults(run=repair_data)


def add_inspect(verbs: Any) -> None:
    inspect = add_verb(
        verbs,
        "inspect",
        "show a page of rows decoded, and what the tokens are like",
        "minilm data inspect books --page 3",
    )
    inspect.add_argument("data", type=Path, metavar="DIR")
    inspect.add_argument("--page", type=int, default=0)
    inspect.add_argument("--rows-per-page", type=positive_whole, default=10)
    add_json(inspect)
    inspect.set_defaults(run=inspect_data)


def add_convert(verbs: Any) -> None:
    convert = add_verb(
        verbs, "convert", "write tars with one record a row", "minilm data convert books books-tars"
    )
    convert.add_argument("data", type=Path, metavar="DIR")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--to", default="rows", help="rows")
    convert.set_defaults(run=convert_data)


def verify_data(options: argparse.Namespace) -> int:
    from minilm.data.tools.verify import verify
    from minilm.orchestrator.driver.status_line import StatusLine

    line = StatusLine(quiet=options.quiet)
    report = verify(
        options.data,
        threads=options.threads,
        progress=lambda done, total: line.show(f"verifying  {done / max(total, 1):.0%}"),
    )
    line.close()
    print_report(report, options)
    return 0 if report.whole else UserError.exit_code


def repair_data(options: argparse.Namespace) -> int:
    from minilm.data.tools.repair import repair
    from minilm.orchestrator.resolve.folders import text_inputs

    inputs = text_inputs(options.text) if options.text else None
    print_report(repair(options.data, mirror=options.mirror, inputs=inputs), options)
    return 0


def inspect_data(options: argparse.Namespace) -> int:
    from minilm.data.tools.explain import inspect

    print_report(inspect(options.data, page=options.page, rows_per_page=options.rows_per_page), options)
    return 0


def convert_data(options: argparse.Namespace) -> int:
    from minilm.data.tools.convert import convert
    from minilm.orchestrator.system.files import check_place

    check_place(options.out)
    print(convert(options.data, options.out, to=options.to).text())
    return 0
