"""`minilm status` reads a work directory as it is: before, while and after a run, and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.run_status import run_status
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.stage.metrics_file import MetricsFile
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.lease import last_holder, take
from minilm.orchestrator.system.processes import Process

STAGES = [
    {"name": "assistant", "steps": 40, "batch": 8, "students": [{"name": "assistant"}]},
    {"name": "family", "steps": 60, "batch": 8, "students": [{"name": "six"}, {"name": "three"}]},
    {"name": "last", "steps": 80, "batch": 8, "students": [{"name": "tiny"}]},
]


@pytest.fixture
def work(tmp_path):
    """The first stage is done, the second one under way, the third one waits."""
    run = RunFolder(tmp_path / "work")
    write_json(run.run, {"recipe": {"name": "mine", "stages": STAGES}})
    first = run.stage("assistant")
    first.student("assistant").mkdir(parents=True)
    write_json(first.done, {"steps": 40})
    write_json(first.published, {"models": []})
    second = run.stage("family")
    checkpoint = second.checkpoints / "step-000000020-1f3a5b7c"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    os.utime(checkpoint / "checkpoint.json", (time.time() - 90, time.time() - 90))
    metrics = {
        "rows_per_second": 4.0,
        "tokens_per_second": 128.0,
        "six/loss": float("nan"),
        "three/loss": 0.5,
    }
    beat = {"attempt": "a", "doing": "evaluating", "part": [3, 16], "step": 23, "time": time.time() - 5}
    beat |= {"workers": 2, "metrics": metrics}
    write_json(second.heartbeat, beat)
    with MetricsFile(second.heldout_metrics) as points:
        points.append(0, {"six/heldout/attention": 2.0})
        points.append(
            20,
            {
                "six/heldout/attention": 0.5,
                "six/heldout/value": 0.25,
                "six/heldout/value/books": 9.0,
                "six/heldout/probe/norm": 9.0,
                "three/heldout/attention": 1.0,
            },
        )
    return run


def test_a_run_under_way(work, capsys):
    lease = take(work.root / "lease")
    assert main(["status", str(work.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["status", str(work.root)]) == 0
    text = capsys.readouterr().out
    lease.release()
    assert (told["recipe"], told["driver_state"], told["finished"]) == ("mine", "alive", False)
    assert told["driver"] == str(Process.this())
    assert [stage["state"] for stage in told["stages"]] == ["done", "begun", "waiting"]
    second = told["stages"][1]
    assert (second["step"], second["steps"], second["doing"]) == (23, 60, "evaluating 3/16")
    assert (second["workers"], second["tokens_per_second"], second["seconds_left"]) == (2, 128.0, 37 * 8 / 4)
    assert second["loss"] == {"six": None, "three": 0.5}  # JSON has no NaN
    assert second["checkpoint"]["step"] == 20
    assert 89 < second["checkpoint"]["age_seconds"] < 300
    assert second["held_out"]["six"] == {"step": 20, "sum": 0.75, "terms": {"attention": 0.5, "value": 0.25}}
    assert told["stages"][0]["exports"] == {"assistant": str(work.stage("assistant").student("assistant"))}
    for part in (
        "works here",
        "23 of 60",
        "step 20, ",
        "six 0.750, three 1.000 at step 20",
        "waiting",
    ):
        assert part in text
    assert f"{Process.this()} has ended in good order" in run_status(work.root).text()


def test_probes_and_a_stage_that_may_end_earlier(work, capsys):
    until = {"probe": "norm", "share_of_teacher": 0.9, "patience": 3}
    stages = [STAGES[0], STAGES[1] | {"until": until}, STAGES[2]]
    write_json(work.run, {"recipe": {"name": "mine", "stages": stages}})
    with MetricsFile(work.stage("family").heldout_metrics) as points:
        points.append(22, {"six/heldout/probe/norm": 8.0, "six/heldout/probe/norm/share-of-teacher": 0.8})
    assert main(["status", str(work.root), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)["stages"][1]
    assert second["probes"] == {"six": {"norm": 8.0, "norm/share-of-teacher": 0.8}}
    assert second["held_out"]["six"]["step"] == 20  # the divergence was not measured again
    text = run_status(work.root).text()
    assert "stage family:\n  six  norm 8.000 (80% of the teacher's)\n" in text
    assert (
        "until norm has 0.9 of the teacher's or has no gain in 3 measurements (not met: at most 60 steps)"
        in text
    )
    beat = json.loads(work.stage("family").heartbeat.read_text()) | {"steps": 30}
    write_json(work.stage("family").heartbeat, beat)
    text = run_status(work.root).text()
    assert "23 of 30" in text and "(met: 30 steps in all)" in text


def test_a_killed_driver_is_seen_and_nothing_is_changed(work):
    program = (
        "import os, signal; from pathlib import Path; from minilm.orchestrator.system.lease import take; "
        f"take(Path({str(work.root / 'lease')!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    before = sorted(work.root.rglob("*"))
    status = run_status(work.root)
    assert status.driver_state == "killed"
    assert "was killed; the same command goes on" in status.text()
    assert sorted(work.root.rglob("*")) == before


def test_a_stage_that_is_trained_and_not_registered_yet(work):
    write_json(work.stage("family").done, {"steps": 60})
    second = run_status(work.root).stages[1]
    assert (second.state, second.step, second.doing) == ("trained", 60, "")


def test_a_driver_of_another_machine_is_alive_as_long_as_it_gives_signs(work):
    lease = take(work.root / "lease")
    lease.release()
    elsewhere = {"host": "other", "machine": "another boot", "pid": 7, "started": 1}
    write_json(lease.path, {"holder": elsewhere, "released": False})
    holder = last_holder(work.root / "lease")
    assert holder is not None and holder.state == "alive"
    os.utime(lease.path, (time.time() - 31, time.time() - 31))
    holder = last_holder(work.root / "lease")
    assert holder is not None and holder.state == "silent"
    assert (
        "process 7 on other is on another machine and gives no sign of life" in run_status(work.root).text()
    )


def test_before_the_first_stage(tmp_path):
    lease = take(tmp_path / "lease")
    assert run_status(tmp_path).preparing == "looking at teachers and data"
    (tmp_path / "data" / ".build").mkdir(parents=True)
    assert "no stage has begun: building the data set" in run_status(tmp_path).text()
    lease.release()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(
        UserError, match=r"is no work directory of a run \(no run.json\); give one, as runs/NAME"
    ):
        run_status(tmp_path)


def test_checkpoints_that_cannot_be_looked_for(work, monkeypatch):
    write_json(work.stage("family").spec, {"checkpoints": "s3://bucket/prefix"})

    def fail(place, folder):
        raise UserError("the package for s3:// is missing")

    monkeypatch.setattr("minilm.orchestrator.driver.run_status.open_store", fail)
    assert "the package for s3:// is missing" in run_status(work.root).text()
