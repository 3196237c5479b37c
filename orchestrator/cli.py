"""The `minilm` command: verbs and arguments, nothing else. Everything a verb does is a function elsewhere.

Exit codes: 0 done · 2 bad recipe or input · 3 stopped on request, resumable · 4 no progress · 6 another run holds
the work directory · 10 infrastructure · 130 ended at once by a second Ctrl-C · 141 whoever read the output has gone.
Errors that a user can mend are one line each on standard error.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import select
import sys
import traceback

from minilm.data.errors import DataError
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import RecipeErrors, Stopped, UserError
from minilm.orchestrator.verbs import data_build, data_order, data_verify
from minilm.orchestrator.verbs.about import Version, add_completion
from minilm.orchestrator.verbs.arguments import Parser, add_group, add_verbs
from minilm.orchestrator.verbs.bench import add_bench_verbs
from minilm.orchestrator.verbs.check import add_check
from minilm.orchestrator.verbs.convert import add_export, add_shrink
from minilm.orchestrator.verbs.evaluate import add_evaluate
from minilm.orchestrator.verbs.library import add_copy, add_list, add_new
from minilm.orchestrator.verbs.models import add_promote, add_pull, add_register
from minilm.orchestrator.verbs.plan import add_plan, add_rehearse
from minilm.orchestrator.verbs.run import add_run
from minilm.orchestrator.verbs.show import add_diff, add_show
from minilm.orchestrator.verbs.status import add_status, add_watch

LOG_LEVELS = (logging.NOTSET, logging.INFO, logging.DEBUG)  # by number of -v; NOTSET: the root's, warnings


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever a file is called: printing never fails
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            options, unknown = parser().parse_known_args(arguments)
            if unknown:
                options.parser.refuse_unknown(unknown)
            return run_verb(options)
        finally:
            print(end="", flush=True)  # or what is left would fail behind our back, when the interpreter ends
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # 128 + SIGPIPE, as a shell reports it of programs that this signal ends


def nobody_reads() -> bool:
    """Has the reader of our standard output gone, as in `minilm … | head`?"""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_verb(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("minilm").setLevel(LOG_LEVELS[min(options.verbose, 2)])
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        return int(options.run(options) or 0)
    except RecipeErrors as error:
        return end(options, error.exit_code, *error.problems)
    except UserError as error:
        return end(options, error.exit_code, str(error))
    except (DataError, ModelError) as error:
        return end(options, UserError.exit_code, str(error))
    except KeyboardInterrupt:
        print("minilm: stopped; the same command goes on or starts again", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            text = f"given the path {str(error.filename)[:60]}…; allowed: 255 bytes a name and 4095 in all"
            return end(options, UserError.exit_code, text)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        text = f"no space left on the disk{where}; free some and run the same command again"
        return end(options, UserError.exit_code, text)


def end(options: argparse.Namespace, exit_code: int, *problems: str) -> int:
    """Say what went wrong, a line a problem and for programs one object, and return the exit code."""
    word = "stopped" if exit_code == Stopped.exit_code else "error"
    if options.verbose > 1:
        traceback.print_exc()
    for problem in problems:
        print(f"minilm: {word}: {problem}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"event": word, "exit_code": exit_code, "problems": problems}, ensure_ascii=False))
    return exit_code


def parser() -> Parser:
    top = Parser(
        prog="minilm",
        description="Distil a Transformer encoder into a small one.",
        epilog="`minilm VERB --help` has examples. Pages: docs/README.md.",
    )
    top.add_argument("--version", action=Version)
    verbs = add_verbs(top)

    add_run(verbs)
    add_check(verbs)
    add_plan(verbs)
    add_rehearse(verbs)
    add_show(verbs)
    add_diff(verbs)
    add_status(verbs)
    add_watch(verbs)
    add_list(verbs)
    add_copy(verbs)
    add_new(verbs)
    build = "minilm data build corpus/*.txt --tokenizer google-bert/bert-base-uncased --out books"
    what = "build, import, look at and care for data sets"
    add_data_verbs(add_group(verbs, "data", what, build, "minilm data inspect books"))
    what = "measure this machine: the loss, a step, the stream"
    add_bench_verbs(add_group(verbs, "bench", what, "minilm bench step", "minilm bench stream --json"))
    add_evaluate(verbs)
    add_export(verbs)
    add_shrink(verbs)
    add_pull(verbs)
    add_promote(verbs)
    add_register(verbs)
    add_completion(verbs, top)
    return top


def add_data_verbs(data: argparse.ArgumentParser) -> None:
    verbs = add_verbs(data)
    data_build.add_build(verbs)
    data_build.add_import(verbs)
    data_verify.add_verify(verbs)
    data_order.add_verify_run(verbs)
    data_verify.add_repair(verbs)
    data_verify.add_inspect(verbs)
    data_verify.add_convert(verbs)
    data_order.add_explain(verbs)
    data_order.add_where(verbs)


if __name__ == "__main__":
    sys.exit(main())
