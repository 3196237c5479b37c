"""One and two workers: the same rows, and one step's gradients equal within float32 rounding, or bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minilm.orchestrator.checkpoint.format import read
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.worker import loop
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.support import checkpoints_in, finished_as, make_spec

BETA1 = 0.9


def gradients(spec: StageSpec) -> dict[str, Tensor]:
    """Of the only step: Adam's first moment is then (1 - β1) times the gradient, and no weight update hides a scale."""
    (newest,) = checkpoints_in(StageFolder(Path(spec.folder)).checkpoints)
    tensors = read(newest)[1]["small.optimizer.safetensors"]
    return {
        k.removeprefix("exp_avg/"): v / (1 - BETA1) for k, v in tensors.items() if k.startswith("exp_avg/")
    }


@pytest.mark.parametrize(("gradient_sum", "data"), [("fast", "shards"), ("exact", "masked")])
def test_two_workers_compute_the_gradient_of_one(request, teacher, tmp_path, monkeypatch, gradient_sum, data):
    """Rows of `masked` hold several documents each."""
    threads = []
    monkeypatch.setattr(loop, "keep_to_own_cores", threads.append)  # test_system_numa has the rest
    rows = request.getfixturevalue(data)
    one = make_spec(rows, teacher, tmp_path / "one", steps=1, warmup_steps=1, gradient_sum=gradient_sum)
    two = replace(one, folder=str(tmp_path / "two"))
    assert run_stage(one)
    assert threads == [one.runtime.threads]
    assert worker_pool.join(worker_pool.start(two, 2)) == [0, 0], worker_pool.log(two)
    ledgers = [finished_as(spec) for spec in (one, two)]
    alone, shared = gradients(one), gradients(two)
    assert alone.keys() == shared.keys()
    assert max(g.abs().max() for g in alone.values()) > 1e-3
    for name, gradient in alone.items():
        if gradient_sum == "exact":
            assert torch.equal(shared[name], gradient), name
        else:
            torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    if gradient_sum == "exact":  # done.json holds the digests of rows and weights
        assert ledgers[0] == ledgers[1]
