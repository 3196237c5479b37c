"""`minilm watch`: the page of a run in any state, on any terminal and on none; it writes nothing."""

from __future__ import annotations

import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.summary import gains, gains_text
from minilm.orchestrator.driver.watch import live
from minilm.orchestrator.driver.watch.curves import Curves, sparkline
from minilm.orchestrator.driver.watch.live import Watch
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.stage.metrics_file import MetricsFile, Point
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.lease import take
from minilm.orchestrator.worker.crash_loop import CrashLoopGuard
from tests.test_verbs_status import STAGES, work  # noqa: F401 (a fixture)


@pytest.fixture
def under_way(work: RunFolder):  # noqa: F811
    """The run of `work`, by this process, with two curves and a restart."""
    second = work.stage("family")
    with MetricsFile(second.step_metrics) as points:
        for step in range(1, 24):
            points.append(step, {"six/loss": 2.0 / step, "three/loss": 1.0, "six/attention": 9.0})
    for _ in range(2):
        guard = CrashLoopGuard(second.root)
        guard.begin(0)
        guard.close()
    lease = take(work.root / "lease")
    yield work
    lease.release()


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if "lease" not in path.parts
    }


def once(folder: Path, capsys, *options: str) -> str:
    assert main(["watch", str(folder), "--once", *options]) == 0
    return capsys.readouterr().out


def test_the_page_of_a_run_under_way(under_way, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = everything(under_way.root)
    out = once(under_way.root, capsys)
    assert everything(under_way.root) == before
    for words in (
        "mine in ",
        " works here (last sign of life ",
        "✓ assistant  done     40 steps\n",
        "▶ family     running  ████████░░░░░░░░░░░░   38%  23 of 60  evaluating 3/16  1m14s left",
        "· last       waiting  ░░░░",
        "  six    loss      █▄▃▃▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁  2.000 → 0.087",
        "         held-out  █▁  2.000 → 0.750",
        "         probes    norm 9.000",
        "  three  loss      ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁  1.000 → 1.000",
        "checkpoint step 20, ",
        " · 2 workers · 128 tokens/s · restarts 1 · heard of ",
    ):
        assert words in out, f"{words!r} in\n{out}"


def test_a_stage_that_is_done_says_what_was_learned(under_way, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    points = [
        {"assistant/heldout/attention": 2.0, "assistant/heldout/probe/knn": 0.25},
        {
            "assistant/heldout/attention": 0.5,
            "assistant/heldout/probe/knn": 0.5,
            "assistant/heldout/probe/knn/share-of-teacher": 0.8,
        },
    ]
    with MetricsFile(under_way.stage("assistant").heldout_metrics) as file:
        for step, metrics in zip((0, 40), points, strict=True):
            file.append(step, metrics)
    said = "held-out divergence 2.000 → 0.500 (25% of the start), knn 0.250 → 0.500 (80% of the teacher's)"
    assert f"✓ assistant  done     40 steps: {said}\n" in once(under_way.root, capsys)
    found = gains([Point(20, 0, {"a/heldout/x": 1.0, "b/heldout/x": 2.0})], ["a", "b", "nobody"])
    assert gains_text(found) == "a: held-out divergence ? → 1.000; b: held-out divergence ? → 2.000"


def test_sparklines():
    assert sparkline([], 8) == ""
    assert sparkline([1.0], 8) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2, "_-#") == "_#"
    assert sparkline([math.nan, 1.0, math.inf, 2.0], 4) == "!▁!█"
    assert sparkline([math.nan, 1.0, 2.0, 2.0], 2) == "▁█", "what is finite of a part"
    assert len(sparkline(list(range(1000)), 40)) == 40


@pytest.mark.parametrize("width", [1, 20, 61])
def test_a_narrow_terminal_cuts_lines(under_way, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", once(under_way.root, capsys)).splitlines()
    assert max(map(len, lines)) <= width and len(lines) == 13


def test_files_that_are_half_written_and_a_run_of_which_nothing_is_there_yet(under_way, tmp_path, capsys):
    second = under_way.stage("family")
    with second.step_metrics.open("a") as file:
        file.write('{"step": 24, "time_ms"')
    for file in (second.heartbeat, second.spec, second.root / "attempts.json"):
        file.write_text('{"doing": "trai')
    assert "step 20, " in once(under_way.root, capsys)
    under_way.run.write_text('{"recipe": {"na')
    assert "no stage has begun: looking at teachers and data" in once(under_way.root, capsys)
    young = take(tmp_path / "young" / "lease")
    assert "no stage has begun" in once(tmp_path / "young", capsys)
    young.release()
    assert "has ended in good order" in once(tmp_path / "young", capsys)


def test_a_stage_that_is_done_again_has_new_curves(under_way):
    watched = Watch(under_way.root)
    assert len(watched.curves["family"].loss["six"]) == 23
    under_way.stage("family").root.rename(under_way.root / "aside")
    with MetricsFile(under_way.stage("family").step_metrics) as points:
        points.append(1, {"six/loss": 5.0})
    watched.look()
    assert watched.curves["family"].loss == {"six": [5.0]}
    assert Curves(under_way.stage("family")).held_out == watched.curves["family"].held_out == []


def test_without_a_terminal_a_line_is_printed_for_what_is_new(under_way, capsys, monkeypatch):
    def meanwhile(seconds: float) -> None:
        """The stages end one after the other, as the page is looked at."""
        stages = [under_way.stage(stage["name"]) for stage in STAGES]
        left = [
            (stage, folder)
            for stage, folder in zip(STAGES, stages, strict=True)
            if not folder.published.exists()
        ]
        for stage, folder in left[:1]:
            write_json(folder.done, {"steps": stage["steps"]})
            write_json(folder.published, {"models": []})
        if not left:
            write_json(under_way.summary, {})

    monkeypatch.setattr(live.time, "sleep", meanwhile)
    assert main(["watch", str(under_way.root)]) == 0
    lines = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "family  running  step 23 of 60  six loss nan  three loss 0.500  held-out six 0.750, three 1.000 at step 20  "
        "1m14s left",
        "mine: finished",
    ]


def test_a_killed_run_is_seen_and_watched_on(under_way, capsys, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    (lease,) = (under_way.root / "lease").glob("*.json")
    lease.write_text(lease.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194999'))
    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert main(["watch", str(under_way.root)]) == 0
    out, errors = capsys.readouterr()
    assert " was killed; the same command goes on\n" in out and "family  stopped  step 23 of 60" in out
    assert errors == "" and "left" not in out
    assert "■ family     stopped" in once(under_way.root, capsys)


def test_no_color_on_a_terminal(under_way, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m" in once(under_way.root, capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in once(under_way.root, capsys)


def test_on_a_terminal_the_page_is_kept_up_to_date_and_ctrl_c_ends_it(under_way):
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm-256color",
        "COLUMNS": "80",
    }
    watching = subprocess.Popen(
        [sys.executable, "-m", "minilm", "watch", str(under_way.root)],
        env=environment,
        stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def read_until(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while words not in seen:
            assert time.monotonic() < deadline and watching.poll() is None, seen
            if select.select([ours], [], [], 1.0)[0]:
                seen += os.read(ours, 1 << 16).decode()

    read_until("23 of 60")
    write_json(under_way.stage("family").done, {"steps": 60})
    read_until("60 of 60")
    watching.send_signal(signal.SIGINT)
    while select.select([ours], [], [], 5.0)[0]:
        try:
            seen += os.read(ours, 1 << 16).decode()
        except OSError:  # the other end is closed
            break
    assert watching.wait(60) == 0
    os.close(ours)
    assert "Traceback" not in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l") > -1, "the cursor is back"
    assert "\x1b[36m" in seen


def test_a_folder_that_is_none_and_a_name(under_way, tmp_path, capsys, monkeypatch):
    for verb in ("watch", "status"):
        assert main([verb, str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err == (
            f"minilm: error: {tmp_path / 'none'} is no work directory of a run (no run.json); give one, as runs/NAME\n"
        )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(under_way.root)
    assert "mine in " in once(Path("mine"), capsys)
