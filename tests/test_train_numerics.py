"""What a stage keeps to from its first attempt on: threads where bits matter, and the precision that auto chose."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilm.model.export import weights_digest
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.train import numerics
from minilm.orchestrator.train.numerics import choose_precision, choose_threads
from minilm.orchestrator.worker.loop import run_stage
from tests.support import change, make_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_decided_once(monkeypatch, caplog):
    for supported, own in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda yes=supported: yes)
        monkeypatch.setattr(numerics, "cpu_computes_in_bfloat16", lambda yes=not supported: yes)
        assert choose_precision("auto", None, CUDA) == own
        assert choose_precision("auto", None, CPU) == ({"bfloat16", "float32"} - {own}).pop()
        assert choose_precision("bfloat16", None, CPU) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(numerics, "cpu_computes_in_bfloat16", lambda: False)
    assert choose_precision("auto", "bfloat16", CUDA) == "bfloat16" and not caplog.records
    assert choose_precision("auto", "float32", CUDA) == "float32"
    assert choose_precision("auto", "bfloat16", CPU) == "bfloat16"
    assert [record.getMessage() for record in caplog.records] == [
        "goes on in float32, as it began, though precision: auto would choose bfloat16 here; --from STAGE begins again",
        "goes on in bfloat16, as it began, though precision: auto would choose float32 here; --from STAGE begins again",
    ]


def test_a_cpu_computes_in_bfloat16_where_it_has_units_and_they_are_faster(monkeypatch):
    for half, faster in ((1, True), (8, False)):
        ticks = itertools.cycle((0, 9, 0, half))  # begin and end in float32, then in bfloat16
        monkeypatch.setattr(numerics.time, "perf_counter", lambda ticks=ticks: next(ticks))
        for unit, has_units in (("amx_bf16", True), ("avx512_bf16", True), ("avx2", False)):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {unit: True})
            assert numerics.cpu_computes_in_bfloat16() is (faster and has_units)


def test_threads_are_kept_where_bits_matter(caplog):
    caplog.set_level(logging.INFO)
    own = torch.get_num_threads()
    assert choose_threads(None, None, exact=True) == own
    assert choose_threads(None, own + 1, exact=False) == own
    assert not caplog.records
    assert choose_threads(None, own + 1, exact=True) == own + 1
    assert choose_threads(own, own + 1, exact=True) == own
    assert ["goes on with" in r.getMessage() for r in caplog.records] == [True, False]
    assert f"compute.threads is {own} and was {own + 1} before" in caplog.messages[-1]


def test_a_stage_that_moves_goes_on_in_the_precision_it_began_with(shards, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "cpu_computes_in_bfloat16", lambda: False)

    def digest(spec: StageSpec) -> str:
        return weights_digest(StageFolder(Path(spec.folder)).student("small"))

    whole = make_spec(shards, teacher, tmp_path / "whole", precision="bfloat16")
    other = make_spec(shards, teacher, tmp_path / "other", precision="auto")
    assert run_stage(whole) and run_stage(other)
    moved = replace(whole, folder=str(tmp_path / "moved"))

    class Halt(Exception):
        pass

    def halt(step: int) -> None:
        if step == 7:
            raise Halt

    with pytest.raises(Halt):
        run_stage(moved, halt)
    assert run_stage(change(moved, precision="auto"))
    assert digest(moved) == digest(whole) != digest(other)
