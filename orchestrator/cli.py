"""The `minilm` command: verbs and arguments, nothing else. Everything a verb does is a function elsewhere.

Exit codes: 0 done · 2 bad recipe or input · 3 stopped on request, resumable · 4 no progress · 6 another run holds
the work directory · 10 infrastructure · 130 ended at once by a second Ctrl-C · 141 whoever read the output has gone.
Errors that a user can mend are one line each on standard error.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import sys

from minilm.data.errors import DataError
from minilm.model.errors import ModelError
from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.verbs.bench import add_bench_verbs
from minilm.orchestrator.verbs.check import add_check
from minilm.orchestrator.verbs.data import add_data_verbs
from minilm.orchestrator.verbs.evaluate import add_evaluate
from minilm.orchestrator.verbs.models import add_promote, add_pull
from minilm.orchestrator.verbs.plan import add_plan
from minilm.orchestrator.verbs.run import add_run


def main(arguments: list[str] | None = None) -> int:
    try:
        try:
            return run_verb(parser().parse_args(arguments))
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
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        return int(options.run(options) or 0)
    except RecipeErrors as error:
        for problem in error.problems:
            print(f"minilm: error: {problem}", file=sys.stderr)
        return error.exit_code
    except UserError as error:
        print(f"minilm: {'stopped' if error.exit_code == 3 else 'error'}: {error}", file=sys.stderr)
        return error.exit_code
    except (DataError, ModelError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("minilm: stopped; the same command goes on or starts again", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"minilm: error: no space left on the disk{where}; free some and run the same command again",
            file=sys.stderr,
        )
        return UserError.exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="minilm", description="Distil a Transformer encoder into a small one.")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    add_run(verbs)
    add_check(verbs)
    add_plan(verbs)
    add_data_verbs(verbs.add_parser("data", help="build, import, look at and care for data sets"))
    add_bench_verbs(verbs.add_parser("bench", help="measure this machine: the loss, a step, the stream"))
    add_evaluate(verbs)
    add_pull(verbs)
    add_promote(verbs)
    return top


if __name__ == "__main__":
    sys.exit(main())
