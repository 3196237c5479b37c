"""`minilm data`: the verbs that build, import, inspect, verify and repair data sets."""

from __future__ import annotations

import argparse

from minilm.orchestrator.verbs import data_build, data_order, data_verify
from minilm.orchestrator.verbs.arguments import add_verbs


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
