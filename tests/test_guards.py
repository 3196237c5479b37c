"""A stage that can't go on ends, and says why: stalls, starts that fail again and again."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
import worker_pool
from support import make_job

from model.encoder import load_encoder
from orchestrator import worker
from orchestrator.reporting import run_reporting
from orchestrator.stage import StageFolder
from orchestrator.students import build_distiller


def test_a_worker_that_makes_no_step_ends_itself_and_leaves_its_stack(shards, teacher, tmp_path):
    job = make_job(shards, teacher, tmp_path, stall_seconds=2.0)
    start = time.monotonic()
    assert worker_pool.join(worker_pool.start(job, 1, hangs_after=5)) == [1]
    assert time.monotonic() - start < 40
    log = StageFolder(tmp_path).worker_log(0).read_text()
    assert "Timeout (0:00:02)!" in log
    assert "in hang_here" in log
    assert run_reporting(replace(job, stall_seconds=300.0))  # what a supervisor starts in its place goes on


def test_a_start_that_fails_three_times_the_same_way_is_not_tried_for_ever(
    shards, teacher, tmp_path, monkeypatch
):
    job = make_job(shards, teacher, tmp_path)
    texts = ["a", "broken", "broken", "broken"]

    def fails(*_):
        raise RuntimeError(f"first line\n{texts.pop(0)}")

    monkeypatch.setattr(worker, "build_distiller", fails)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run_reporting(job)
    assert not run_reporting(job)
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 4
    assert (
        "could not start, 3 times in a row, because of RuntimeError: broken; the whole" in failure["message"]
    )
    monkeypatch.undo()
    assert not run_reporting(job)  # of this attempt nothing is started any more
    assert run_reporting(replace(job, attempt="next"))


def test_reaching_the_loop_forgets_failed_starts(shards, teacher, tmp_path, monkeypatch):
    job = make_job(shards, teacher, tmp_path)

    def fails(*_):
        raise RuntimeError("broken")

    def dies(step):
        raise RuntimeError("broken")

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(worker, "build_distiller", fails)
            run_reporting(job)
        with pytest.raises(RuntimeError):
            run_reporting(job, dies)
    assert run_reporting(job)


def test_students_start_from_the_teachers_layers_where_the_recipe_says_so(shards, teacher, tmp_path):
    job = make_job(shards, teacher, tmp_path, students=(("small", 2, 48),))
    own = replace(job, students=tuple(replace(s, init="teacher-layers") for s in job.students))
    expected = load_encoder(teacher).model.get_input_embeddings().weight
    for given, same in ((job, False), (own, True)):
        model = build_distiller(given, torch.device("cpu")).students["small"].model
        assert torch.equal(model.get_input_embeddings().weight, expected) is same


def test_a_save_that_fails_on_the_main_rank_ends_all_ranks_at_their_next_step(shards, teacher, tmp_path):
    job = make_job(shards, teacher, tmp_path, steps=2000)
    (tmp_path / "checkpoints").write_text("not a folder")
    start = time.monotonic()
    assert worker_pool.join(worker_pool.start(job, 2)) == [1, 1]
    assert time.monotonic() - start < 30
    assert "File exists" in StageFolder(tmp_path).worker_log(0).read_text()
    assert "the main rank could not save, and says why" in StageFolder(tmp_path).worker_log(1).read_text()
