"""The benches of what surrounds a step: they measure what they say, and say what is too little to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from minilm.orchestrator import cli
from minilm.orchestrator.bench.overhead import (
    WARM_STEPS,
    BareStep,
    Cost,
    Run,
    overhead_rows,
    row,
    tree_seconds,
)
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.system.processes import descendants
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard, reached
from tests.support import make_spec
from tests.test_driver_curriculum import write_recipe


def test_processor_time_is_that_of_the_whole_tree():
    """A child that waits, with a grandchild that computes and one that has ended."""
    burn = "import time\nwhile time.process_time() < 0.6: pass\n"  # the kernel's count may lack some ticks
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        f"subprocess.Popen([sys.executable, '-c', {burn!r} + 'time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while tree_seconds(process.pid) < 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert tree_seconds(process.pid) < 2.0
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_the_bare_step_takes_processor_time(shards, teacher, tmp_path):
    way = BareStep(make_spec(shards, teacher, tmp_path))
    cpu, wall = way.turn(3)
    assert 0 < cpu < 5 and 0 < wall < 60 and way.made == WARM_STEPS + 3


def test_a_stage_too_short_to_measure_is_refused(text, teacher, tmp_path):
    recipe = write_recipe(tmp_path, text, teacher)
    advice = (
        "assistant has 40 steps, too few for 2 rounds of 60; give less of them, or "
        "--set stages.assistant.steps=146"
    )
    with pytest.raises(UserError, match=advice):
        overhead_rows(load_recipe(recipe), recipe, [], starts=1, rounds=2, steps=60)


def test_checkpoints_of_the_recipes_own_run_are_left_alone(text, teacher, tmp_path):
    recipe, long = write_recipe(tmp_path, text, teacher), "stages.assistant.steps=900"
    elsewhere = [long, f"compute.checkpoints={tmp_path / 'store'}"]
    with pytest.raises(UserError, match="store, which .*; measure with --set compute.checkpoints=null"):
        overhead_rows(load_recipe(recipe, elsewhere), recipe, elsewhere, starts=1, rounds=0, steps=60)
    without = [*elsewhere, "compute.checkpoints=null"]
    assert load_recipe(recipe, without).compute.checkpoints is None


def test_a_save_is_measured(shards, teacher, tmp_path, capsys):
    file = tmp_path / "stage.json"
    file.write_text(make_spec(shards, teacher, tmp_path, checkpoint_every_seconds=60.0).to_json())
    assert cli.main(["bench", "save", str(file), "--rounds", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["megabytes"] > 0.05
    assert 0 < row["share"] <= row["share_at_most"] < 1
    assert row["stall_cpu_ms"] <= 1.5 * row["stall_ms"] + 1
    assert list(Path(tmp_path).iterdir()) == [file]
    assert cli.main(["bench", "save", str(file), "--rounds", "1"]) == 0
    assert "the loop stands still for" in capsys.readouterr().out


def test_a_way_is_compared_with_the_loop_alone_in_the_same_round():
    """A machine that grows slower from round to round changes no ratio."""
    base = [Cost(1.0, 2.0), Cost(10.0, 20.0), Cost(100.0, 200.0)]
    found = [Cost(1.5, 2.2), Cost(11.0, 24.0), Cost(120.0, 200.0)]
    way = row("ray", found, base, 7)
    assert (way.turns, way.steps, way.cpu_ms, way.wall_ms) == (3, 7, 11e3, 24e3)
    assert (way.cpu_over, *way.cpu_quartiles) == pytest.approx((0.2, 0.15, 0.35))
    assert (way.wall_over, *way.wall_quartiles) == pytest.approx((0.1, 0.05, 0.15))
    alone = row("worker", base[:1], base[:1], 7)
    assert alone.wall_over == 0 and alone.wall_quartiles == (0, 0)


def test_a_run_is_stopped_except_in_its_turns(tmp_path, monkeypatch):
    """So are the processes that it has started, and all end with the bench."""
    program = f"""
        import time
        from pathlib import Path
        from minilm.orchestrator.worker.crash_loop import CrashLoopGuard
        guard, step = CrashLoopGuard(Path({str(tmp_path)!r})), 0
        while True:
            guard.reach(step)
            step += 1
            time.sleep(0.001)
    """
    (tmp_path / "fake_run.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {textwrap.dedent(program)!r}])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with Run(["fake_run"], tmp_path, 10**9) as run:
        stopped = reached(tmp_path)
        assert stopped >= WARM_STEPS
        below = descendants(run.process.pid)
        assert len(below) == 1
        for _ in range(2):
            time.sleep(0.05)
            assert reached(tmp_path) == stopped, "nobody moves"
            assert run.turn(5).wall < 60
            assert reached(tmp_path) >= stopped + 5
            stopped = reached(tmp_path)
    assert run.process.returncode == -15 and below[0].is_gone()


def test_a_run_that_goes_back_or_through_its_stage_is_not_measured(tmp_path):
    """Its worker has died; nobody takes more steps."""
    guard = CrashLoopGuard(tmp_path)
    run = Run(["nothing"], tmp_path, 30)
    try:
        run.process.wait()
        guard.reach(25)
        assert run.wait_for(20) == 25
        guard.reach(3)
        with pytest.raises(UserError, match="the run went back from step 25 to 3; its worker has died"):
            run.step = 25
            run.wait_for(26)
        guard.reach(30)
        with pytest.raises(
            UserError, match="the stage's 30 steps ended before they were measured; give it more"
        ):
            run.wait_for(26)
    finally:
        run.end()
        guard.close()


def test_a_run_that_ends_too_early_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the run ended before it was measured: .*No module named nothing"):
        Run(["nothing"], tmp_path, 30).__enter__()


@pytest.mark.slow  # Ray
def test_supervision_is_measured_each_way(text, teacher, tmp_path, capsys, monkeypatch):
    """In a store of its own: nobody listens at the server that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    recipe = write_recipe(tmp_path, text, teacher)
    command = ["bench", "overhead", str(recipe), "--set", "stages.assistant.steps=90000", "--steps", "200"]
    assert cli.main([*command, "--starts", "1", "--rounds", "5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["step", "worker", "again", "inline", "ray"]
    assert all(row["cpu_ms"] > 0 and row["wall_ms"] > 0 and row["turns"] == 5 for row in rows)
    assert rows[1]["wall_over"] == rows[1]["cpu_over"] == 0
    assert rows[0]["cpu_over"] < rows[4]["cpu_over"], "the step alone is less than what Ray's daemons come to"
