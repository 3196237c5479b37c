"""The benches of what surrounds a step: they measure what they say, and say what is too little to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import make_job
from test_curriculum import write_recipe

from orchestrator import cli
from orchestrator.bench_overhead import bare, overhead_rows, tree_seconds
from orchestrator.errors import UserError
from orchestrator.recipe import load_recipe


def test_processor_time_is_that_of_the_whole_tree():
    """A child that waits, with a grandchild that computes and one that has ended."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\n"
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
    cpu, wall = bare(make_job(shards, teacher, tmp_path), 3)
    assert 0 < cpu < 5 and 0 < wall < 60


def test_a_stage_too_short_to_measure_is_refused(text, teacher, tmp_path):
    recipe = write_recipe(tmp_path, text, teacher)
    advice = (
        "assistant has 40 steps, too few to measure 60; give --steps less, or --set stages.assistant.steps=88"
    )
    with pytest.raises(UserError, match=advice):
        overhead_rows(load_recipe(recipe), recipe, [], rounds=1, steps=60)


def test_checkpoints_of_the_recipes_own_run_are_left_alone(text, teacher, tmp_path):
    recipe, long = write_recipe(tmp_path, text, teacher), "stages.assistant.steps=900"
    elsewhere = [long, f"compute.checkpoints={tmp_path / 'store'}"]
    with pytest.raises(UserError, match="store, which .*; measure with --set compute.checkpoints=null"):
        overhead_rows(load_recipe(recipe, elsewhere), recipe, elsewhere, rounds=0, steps=60)
    without = [*elsewhere, "compute.checkpoints=null"]
    assert load_recipe(recipe, without).compute.checkpoints is None


def test_a_save_is_measured(shards, teacher, tmp_path, capsys):
    file = tmp_path / "job.json"
    file.write_text(make_job(shards, teacher, tmp_path, checkpoint_every_seconds=60.0).to_json())
    assert cli.main(["bench", "save", str(file), "--rounds", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["megabytes"] > 0.05
    assert 0 < row["share"] <= row["share_at_most"] < 1
    assert row["stall_cpu_ms"] <= 1.5 * row["stall_ms"] + 1
    assert list(Path(tmp_path).iterdir()) == [file]
    assert cli.main(["bench", "save", str(file), "--rounds", "1"]) == 0
    assert "the loop stands still for" in capsys.readouterr().out


@pytest.mark.slow  # Ray
def test_supervision_is_measured_each_way(text, teacher, tmp_path, capsys, monkeypatch):
    """In a store of its own: nobody listens at the server that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    recipe = write_recipe(tmp_path, text, teacher)
    command = ["bench", "overhead", str(recipe), "--set", "stages.assistant.steps=9000", "--steps", "200"]
    assert cli.main([*command, "--rounds", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["step", "worker", "inline", "ray"]
    step, worker, inline, ray = (row["cpu_ms"] for row in rows)
    assert min(step, inline) > 0
    assert 0 < worker < ray, "Ray has its daemons"
    assert rows[1]["overhead"] == 0 and rows[3]["overhead"] == pytest.approx(ray / worker - 1)
