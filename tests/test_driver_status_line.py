"""What a person sees: one line that fits the terminal, and that never ends a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm.data.builder.phases import BuildProgress
from minilm.orchestrator.driver.status_line import JsonLines, StageProgress, StatusLine, describe_build
from minilm.orchestrator.driver.summary import ModelEntry, Summary
from minilm.orchestrator.system.text import duration
from minilm.orchestrator.worker.loop import run_stage
from minilm.orchestrator.worker.metric_logger import MetricLogger
from tests.support import NO_DATA, make_spec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7260, "2h01m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_live_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    StatusLine(out).show("x" * 100)
    assert out.getvalue() == "\r\x1b[2K" + "x" * 39


def test_elsewhere_a_line_is_printed_now_and_then():
    out = io.StringIO()
    line = StatusLine(out)
    for number in range(100):
        line.show(f"step {number}")
    line.show("last", force=True)
    assert out.getvalue() == "step 0\nlast\n"


def test_a_terminal_that_has_gone_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "w")
    line = StatusLine(out)
    line.show("to nobody", force=True)
    line.say("to nobody")
    closed = io.StringIO()
    line = StatusLine(closed)
    closed.close()
    line.show("closed", force=True)


def test_a_stage_line_says_step_terms_speed_and_time_left(tmp_path):
    spec = make_spec(NO_DATA, tmp_path, tmp_path, steps=240, batch=16)
    metrics = {
        "small/loss": 0.8125,
        "small/attention": 0.4,
        "small/value": 0.4125,
        "small/gradient_norm": 3.0,
        "small/skipped_steps": 1.0,
        "small/value/head-01": 0.2,
        "rows_per_second": 32.0,
        "tokens_per_second": 4096.0,
    }
    out = io.StringIO()
    progress = StageProgress(StatusLine(out), spec, "[1/2] first")
    progress.show({"doing": "training", "step": 120, "metrics": metrics}, "last heartbeat 20 s ago")
    assert out.getvalue() == (
        "[1/2] first  step 120/240  loss 0.812 (attention 0.400 value 0.412)  32 rows/s  4.1k tokens/s  1m00s left  "
        "last heartbeat 20 s ago\n"
    )


def test_the_time_left_is_known_before_the_first_logged_step(tmp_path, shards, teacher):
    """A worker tells of its speed with every heartbeat; a point of the metrics comes every `log_every` steps only."""
    spec = make_spec(shards, teacher, tmp_path, steps=3, log_every=100)
    beats = []
    run_stage(spec, lambda step: beats.append(json.loads((tmp_path / "heartbeat.json").read_text())))
    out = io.StringIO()
    progress = StageProgress(StatusLine(out), spec, "[1/1] first")
    assert beats[0]["metrics"]["rows_per_second"] > 0
    progress.show(beats[0] | {"step": 1})
    assert " rows/s " in out.getvalue() and out.getvalue().endswith(" left\n")


@pytest.mark.parametrize(
    ("load", "why"),
    [(9.9, "other programs want them too"), (2.1, "they are not crowded: look for a limit or throttling")],
)
def test_steps_that_take_a_multiple_are_said_once_with_the_load(tmp_path, load, why):
    out = io.StringIO()
    progress = StageProgress(StatusLine(out), make_spec(NO_DATA, tmp_path, tmp_path, steps=9), "[1/1] first")
    slowness = {"times": 3.14, "load": load, "processors": 2}
    for step in (4, 5):
        progress.show({"doing": "training", "step": step, "metrics": {}, "slowness": slowness})
    said = f"[1/1] first  steps take 3.1 times as long as before: the load is {load} on 2 processors, and {why}\n"
    assert out.getvalue() == f"{said}[1/1] first  step 4/9\n"


def test_evaluating_and_exporting_are_counted(tmp_path, shards, teacher, monkeypatch):
    beats = []
    monkeypatch.setattr(
        MetricLogger, "beat", lambda self, doing, step, *, part=None, force=False: beats.append((doing, part))
    )
    spec = make_spec(shards, teacher, tmp_path, steps=2, students=(("a", 1, 24), ("b", 1, 16)))
    assert run_stage(spec)
    assert beats.count(("evaluating", (1, 2))) == 2  # 8 rows in micro-batches of 4, at step 0 and at the end
    assert [part for doing, part in beats if doing == "exporting" and part] == [(0, 2), (1, 2)]
    out = io.StringIO()
    progress = StageProgress(StatusLine(out), spec, "[1/1] first")
    progress.show({"doing": "evaluating", "part": [1, 2], "step": 2, "metrics": {}})
    assert out.getvalue() == "[1/1] first  step 2/2  evaluating 1/2\n"


def test_a_line_that_nothing_follows_counts_the_seconds(monkeypatch):
    monkeypatch.setattr("minilm.orchestrator.driver.status_line.TICK_SECONDS", 0.01)
    monkeypatch.setattr("minilm.orchestrator.driver.status_line.PLAIN_TICK_SECONDS", 0.02)
    for out in (Terminal(), io.StringIO()):
        line = StatusLine(out)
        line.show("starting Ray", force=True)
        while "starting Ray (0s)" not in out.getvalue():
            time.sleep(0.005)
        line.close()
        told = out.getvalue()
        time.sleep(0.05)
        assert out.getvalue() == told
        line.show("next", force=True)
        assert "next" in out.getvalue()
        line.close()


def test_quiet_leaves_warnings_only():
    out = io.StringIO()
    line = StatusLine(out, quiet=True)
    line.show("step 1", force=True)
    line.say("done before")
    line.warn("a worker was killed")
    line.close()
    assert out.getvalue() == "a worker was killed\n"


def test_json_lines_hold_the_facts_and_no_number_that_json_has_not(tmp_path, monkeypatch):
    monkeypatch.setattr("minilm.orchestrator.driver.status_line.TICK_SECONDS", 3600)
    out = io.StringIO()
    line, spec = JsonLines(out), make_spec(NO_DATA, tmp_path, tmp_path, steps=240, batch=16)
    progress = StageProgress(line, spec, "[1/2] first")
    progress.show(None)
    metrics = {"small/loss": float("nan"), "rows_per_second": 32.0, "tokens_per_second": 4096.0}
    for step in range(120, 130):  # ten within a tick: one line
        progress.show({"doing": "training", "step": step, "metrics": metrics, "workers": 2})
    line.warn("a worker was killed")
    starting, training, warning = map(json.loads, out.getvalue().splitlines())
    assert (starting["event"], starting["doing"], starting["stage"]) == ("progress", "starting", "first")
    assert (training["step"], training["steps"], training["seconds_left"]) == (120, 240, 60.0)
    assert training["metrics"]["small/loss"] is None
    assert (warning["event"], warning["text"]) == ("warning", "a worker was killed")


def test_a_build_line_without_a_guess_of_the_time_left():
    progress = BuildProgress("tokenize", 1, 9, 0.45, 4500, 210_000, 1.0, float("nan"))
    assert describe_build(progress) == "building shards (tokenize)  45%  4,500 documents  210k tokens/s"


def test_the_first_signal_asks_to_stop_even_when_nobody_reads_what_it_says():
    """As behind `| tee`, which the same Ctrl-C has ended."""
    program = (
        "import os, signal; from minilm.orchestrator.system.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    raise SystemExit(0 if stop.requested else 9)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        assert subprocess.run([sys.executable, "-c", program], stderr=nobody, check=False).returncode == 0


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time; from minilm.orchestrator.system.signals import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 130
    assert "SIGTERM: stopping at the next step boundary (again: at once)" in done.stderr


def make_summary(look: str) -> Summary:
    def entry(name: str, **values: object) -> ModelEntry:
        common = {
            "role": "r",
            "layers": 3,
            "hidden": 192,
            "parameters": 7_300_000,
            "tokens_per_second": 43_993.0,
        }
        shown = {"before": {}, "after": {}, "registered": "", "folder": "/w/stages/s/students/s"}
        return ModelEntry(name=name, **common | shown | values)

    student = entry(
        "s",
        before={"attention": 1.0, "value": 0.5},
        after={"attention": 0.25, "value": 0.2},
        registered="q-s v2",
    )
    perfect = entry("p", before={"value": 0.0}, after={"value": 0.0}, registered="q-p v1")
    lost = entry("l", after={"attention": 0.125, "value": 0.5}, registered="q-l v1")
    return Summary("q", (entry("t"), lost, student, perfect), 75.0, look, "/w", "newest")


def test_the_table_gives_divergence_by_term_and_as_a_share():
    table = make_summary("mlflow ui").table()
    assert "attention 1.000 → 0.250, value 0.500 → 0.200, sum 1.500 → 0.450 (30%)" in table
    assert "attention ? → 0.125, value ? → 0.500, sum ? → 0.625  " in table
    assert "43,993" in table
    assert "7.3 M" in table
    assert "q-s v2" in table


@pytest.mark.parametrize(
    ("look", "pull"),
    [
        ("mlflow ui --backend-store-uri sqlite:////w/mlflow.db", "pull models:/q-p@newest DIR --workdir /w"),
        ("http://server/#/experiments/1", "pull models:/q-p@newest DIR"),
    ],
)
def test_the_next_steps_can_be_typed_as_they_stand(look, pull):
    lines = make_summary(look).next_steps().splitlines()
    assert any(line.endswith(pull) for line in lines)
    assert str(Path("/w/stages/s/*.png")) in "\n".join(lines)
