"""`minilm data`: the verbs that build, import, inspect, verify and repair data sets."""

from __future__ import annotations

from typing import Any

from minilm.orchestrator.verbs import data_build, data_order, data_verify
from minilm.orchestrator.verbs.arguments import add_group


def add_data_verbs(top: Any) -> None:
    verbs = add_group(
        top,
        "data",
        "build, import, look at and care for data sets",
        "minilm data build corpus/*.txt --tokenizer google-bert/bert-base-uncased --out books",
        "minilm data inspect books",
    )
    data_build.add_build(verbs)
    data_build.add_import(verbs)
    data_verify.add_verify(verbs)
    data_order.add_verify_run(verbs)
    data_verify.add_repair(verbs)
    data_verify.add_inspect(verbs)
    data_verify.add_convert(verbs)
    data_order.add_explain(verbs)
    data_order.add_where(verbs)
