"""`minilm data build` and `minilm data import`: text, or token files of other programs, into shards."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.verbs.arguments import add_verb


def add_build(verbs: Any) -> None:
    build = add_verb(
        verbs,
        "build",
        "turn text into shards of token rows",
        "minilm data build corpus/*.jsonl.gz --tokenizer google-bert/bert-base-uncased --out books",
        "minilm data build notes.csv --text-field body --tokenizer teacher --seq-len 128 --out notes",
    )
    build.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="txt, json, jsonl, csv, tsv, parquet, arrow; also packed"
    )
    add_text_options(build)
    _add_building(build)
    build.set_defaults(run=build_data)


def add_text_options(verb: argparse.ArgumentParser) -> None:
    """How text is read: `TEXT_OPTIONS` of the recipe."""
    verb.add_argument(
        "--text-field",
        help="the field or column that holds the text; a dotted path, as meta.text, leads into objects "
        "(default: see docs/data.md)",
    )
    verb.add_argument(
        "--line-documents", action="store_true", default=None, help="each line of a txt file is a document"
    )
    verb.add_argument(
        "--invalid-utf8",
        choices=("stop", "replace"),
        help="bytes that are not UTF-8: an error (default), or replaced by U+FFFD and counted",
    )
    verb.add_argument(
        "--csv-separator", metavar="SIGN", help="comma, tab, semicolon, bar or one character (default: found)"
    )
    header = verb.add_mutually_exclusive_group()
    header.add_argument(
        "--csv-header", action="store_true", default=None, help="the first row has the columns' names"
    )
    header.add_argument(
        "--csv-no-header",
        dest="csv_header",
        action="store_false",
        help="the first row is data; columns are called 1, 2, …",
    )
    verb.add_argument(
        "--csv-quoting",
        choices=("standard", "backslash", "none"),
        help="default: none behind tabs, else standard",
    )
    verb.add_argument(
        "--csv-ragged", action="store_true", default=None, help="take rows with more or fewer columns"
    )


def add_import(verbs: Any) -> None:
    imported = add_verb(
        verbs,
        "import",
        "turn token files of other programs into shards",
        "minilm data import gpt_text_document --from megatron --source-tokenizer gpt2 --tokenizer teacher --out rows",
        "minilm data import wiki.tar --from webdataset --field txt --tokenizer teacher --out rows",
    )
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
        "--field",
        help="part of a sample that is read, as txt or tokens.npy (webdataset; default: see docs/data.md)",
    )
    imported.add_argument("--text-field", help="field of a json part (webdataset)")
    imported.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a plug-in's own; the value is read as YAML; may be given several times",
    )
    _add_building(imported)
    imported.set_defaults(run=import_tokens)


def _add_building(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer", required=True, help="the teacher's: a folder, package:NAME/PATH or a hub id"
    )
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--seq-len", type=int, default=512)
    verb.add_argument("--packing", choices=("full", "masked", "document", "sentence"), default="full")
    verb.add_argument(
        "--language", default="en", metavar="CODE", help="of the text, for --packing sentence (default: en)"
    )
    verb.add_argument("--held-out", type=float, default=0.01, help="share of documents kept for measuring")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument(
        "--special-tokens",
        choices=("text", "tokens"),
        default="text",
        help="what names of special tokens in the text become (default: text, and counted)",
    )
    add_allow_skipped(verb)
    verb.add_argument("--processes", type=int, help="default: the number of cores")
    verb.add_argument(
        "--ray", action="store_true", help="on the Ray cluster that RAY_ADDRESS names or runs here"
    )


def add_allow_skipped(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--allow-skipped",
        type=float,
        metavar="SHARE",
        help="share of the records that may give no document (default: half)",
    )


def build_data(options: argparse.Namespace) -> int:
    from minilm.orchestrator.recipe.schema import TEXT_OPTIONS
    from minilm.orchestrator.resolve.folders import text_inputs

    given = {name: getattr(options, name) for name in TEXT_OPTIONS}
    return _import(options, text_inputs(options.inputs), "text", given)


def import_tokens(options: argparse.Namespace) -> int:
    names = ("source_tokenizer", "dict", "encoder", "field", "text_field")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "source_tokenizer" in given:
        from minilm.orchestrator.resolve.folders import tokenizer_name

        given["source_tokenizer"] = tokenizer_name(given["source_tokenizer"])
    return _import(options, options.inputs, options.source, given | source_options(options.option))


def source_options(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` each. Raises `UserError` for what is none, or has no value of JSON."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            read = yaml.safe_load(value)
            json.dumps(read)
        except (yaml.YAMLError, TypeError):
            read = equals = ""
        if not key or not equals:
            raise UserError(
                f"--option: given {text!r}; allowed: KEY=VALUE with a text, number, list or true/false"
            )
        found[key] = read
    return found


def _import(options: argparse.Namespace, inputs: Any, source: str, given: dict[str, Any]) -> int:
    from minilm.data.builder.build import import_data
    from minilm.orchestrator.driver.status_line import StatusLine, build_reporter
    from minilm.orchestrator.resolve.folders import tokenizer_name
    from minilm.orchestrator.system.signals import StopRequest

    line = StatusLine(quiet=options.quiet)
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
            special_tokens=options.special_tokens,
            language=options.language,
            allow_skipped=options.allow_skipped,
            progress=build_reporter(line, stop),
            on_ray=options.ray,
        )
    line.close()
    print(report.text())
    return 0
