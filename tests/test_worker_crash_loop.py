"""Attempts that die at the same step are counted; those that get further, or end in good order, are not."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from minilm.data.stream import Stream
from minilm.orchestrator.errors import NoProgress
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.worker import export
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard, count_start_failure
from minilm.orchestrator.worker.error_file import run_reporting
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.support import make_spec


def dies_at(folder: Path, first: int, *steps: int) -> int | None:
    """An attempt that begins at `first` and dies while it computes the last of `steps`."""
    guard = CrashLoopGuard(folder)
    answer = guard.begin(first)
    for step in steps if answer is None else ():
        guard.reach(step)
    guard.close()
    return answer


def test_three_deaths_at_one_step_are_enough(tmp_path):
    for _ in range(3):
        assert dies_at(tmp_path, 5, 5, 6, 7) is None
    assert dies_at(tmp_path, 5) == 7
    assert dies_at(tmp_path, 5, 5, 6, 7) is None  # asked again, it tries again


def test_deaths_at_different_steps_are_a_machine_that_comes_and_goes(tmp_path):
    for last in (7, 8, 6, 8, 6, 7):
        assert dies_at(tmp_path, 5, 5, last) is None
    for _ in range(2):
        assert dies_at(tmp_path, 5, 7) is None  # with the one before: three
    assert dies_at(tmp_path, 5) == 7


def test_a_good_end_forgets(tmp_path):
    for _ in range(2):
        dies_at(tmp_path, 0, 4)
    guard = CrashLoopGuard(tmp_path)
    assert guard.begin(0) is None
    guard.reach(4)
    guard.end()
    guard.close()
    for _ in range(3):
        assert dies_at(tmp_path, 0, 4) is None


@pytest.mark.parametrize("left", [b"", b'{"running": tr', b"\0" * 60, b"{}"])
def test_files_that_a_power_failure_has_cut_count_nothing(tmp_path, left):
    for _ in range(2):
        dies_at(tmp_path, 0, 4)
        count_start_failure(tmp_path, 0, "broken")
    (tmp_path / "attempts.json").write_bytes(left)
    (tmp_path / "failed-starts-0.json").write_bytes(left)
    assert count_start_failure(tmp_path, 0, "broken") == 1
    for _ in range(3):
        assert dies_at(tmp_path, 0, 4) is None
    (tmp_path / "reached").write_bytes(left)
    assert dies_at(tmp_path, 0, 4) is None  # three deaths, but nobody knows where


def test_a_stage_that_dies_at_one_step_again_and_again_stops_and_names_its_rows(shards, teacher, tmp_path):
    """Real deaths: SIGKILL by itself, in the same step of every attempt."""
    spec = make_spec(shards, teacher, tmp_path, batch=12)
    for _ in range(3):
        assert worker_pool.join(worker_pool.start(spec, 1, dies_after=5)) == [-signal.SIGKILL]
    pattern = (
        r"stage first: 3 attempts in a row ended while they computed step 4, "
        r"of rows \d+(, \d+){7}, … \(12 rows, all in"
    )
    with pytest.raises(NoProgress, match=pattern) as raised:
        run_stage(spec)
    assert raised.value.exit_code == 4
    failed = json.loads(StageFolder(tmp_path).failed_step.read_text())
    stream = Stream(shards, seed=spec.seed, batch=12, micro_batch=12)
    assert failed == {"step": 4, "row_ids": stream.row_ids(4, 0).tolist()}
    assert run_stage(spec)


def test_an_export_that_fails_again_and_again_ends_the_run(shards, teacher, tmp_path, monkeypatch):
    spec = make_spec(shards, teacher, tmp_path)

    def fails(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(export, "export_student", fails)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="broken"):
                run_reporting(spec)
        assert not run_reporting(spec)
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 4
    assert re.match(
        "stage first: 3 attempts in a row ended while they exported the students, all 12 steps being made; look at",
        failure["message"],
    )
    assert run_reporting(replace(spec, attempt="next"))


def test_all_ranks_hear_of_it_and_the_driver_gets_the_exit_code(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path)
    for _ in range(3):
        dies_at(tmp_path, 0, 4)
    assert worker_pool.join(worker_pool.start(spec, 2)) == [3, 3], worker_pool.log(spec)
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 4
    assert re.match("stage first: 3 attempts in a row ended while they computed step 4", failure["message"])
    assert worker_pool.join(worker_pool.start(spec, 1)) == [3]  # a supervisor that starts it again: no storm
