"""Metrics files: strictly increasing steps, whole lines, nothing doubled by a resumed run."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm.orchestrator.stage.metrics_file import MetricsFile, read_all_metrics, read_metrics


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    before = time.time_ns() // 1_000_000
    with MetricsFile(tmp_path / "deep" / "metrics.jsonl") as log:
        assert log.last_step is None
        assert log.append(0, {"small/loss": 0.1 + 0.2})
        assert log.append(10, {"small/loss": 1e-300, "learning_rate": 3})
    points, offset = read_metrics(tmp_path / "deep" / "metrics.jsonl")
    assert [point.step for point in points] == [0, 10]
    assert points[0].metrics == {"small/loss": 0.1 + 0.2}  # to the last bit
    assert points[1].metrics == {"small/loss": 1e-300, "learning_rate": 3.0}
    assert before <= points[0].time_ms <= points[1].time_ms <= time.time_ns() // 1_000_000
    assert offset == (tmp_path / "deep" / "metrics.jsonl").stat().st_size


def test_replayed_steps_are_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as log:
        assert [log.append(step, {"loss": step}) for step in (1, 2, 3)] == [True] * 3
        assert not log.append(3, {"loss": 9})
    content = path.read_bytes()
    with MetricsFile(path) as log:  # resumed from a checkpoint at step 1
        assert log.last_step == 3
        assert [log.append(step, {"loss": step}) for step in (2, 3, 4)] == [False, False, True]
    assert path.read_bytes().startswith(content)
    assert [point.step for point in read_all_metrics(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as log:
        log.append(1, {"loss": 1.0})
        log.append(2, {"loss": 2.0})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:keep])
    assert [point.step for point in read_metrics(path)[0]] == [1]  # the reader waits for the end of a line
    with MetricsFile(path) as log:
        assert log.last_step == 1
        assert log.append(2, {"loss": 2.5})
    assert [point.metrics["loss"] for point in read_metrics(path)[0]] == [1.0, 2.5]


def test_values_that_are_not_finite_survive_in_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as log:
        log.append(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (point,) = read_metrics(path)[0]
    assert math.isnan(point.metrics["a"])
    assert point.metrics["b"] == math.inf
    assert point.metrics["c"] == -math.inf


def test_tailing_takes_whole_lines_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path, 0) == ([], 0)
    with MetricsFile(path) as log:
        for step in range(50):
            log.append(step, {"loss": step})
        seen, offset = read_metrics(path, 0, limit_bytes=500)
        assert 0 < len(seen) < 15
        while new := read_metrics(path, offset, limit_bytes=500)[0]:
            seen += new
            offset = read_metrics(path, offset, limit_bytes=500)[1]
        log.append(50, {"loss": 50})
    seen += read_metrics(path, offset)[0]
    assert [point.step for point in seen] == list(range(51))


def test_a_damaged_line_and_a_shortened_file_are_said_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as log:
        log.append(1, {"loss": 1.0})
        os.write(log._file, b'{"step": 2, "tim\n')
        log.append(3, {"loss": 3.0})
    points, offset = read_metrics(path)
    assert [point.step for point in points] == [1, 3]
    assert "skipped a damaged line of 16 bytes" in caplog.text
    points, _ = read_metrics(path, offset + 1000)
    assert [point.step for point in points] == [1, 3]
    assert "reading it again" in caplog.text


def test_a_worker_that_was_replaced_can_not_double_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as old, MetricsFile(path) as new:
        assert old.append(1, {"loss": 1.0})
        assert new.append(2, {"loss": 2.0})
        assert not old.append(2, {"loss": 2.0})
        assert not new.append(1, {"loss": 1.0})
    assert [point.step for point in read_metrics(path)[0]] == [1, 2]


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    real = os.write
    with MetricsFile(path) as log:
        log.append(1, {"loss": 1.0})
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:9]))
        with pytest.raises(OSError, match="only 9 of .* free some disk space") as error:
            log.append(2, {"loss": 2.0})
        # what the command line turns into one line about the disk
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
        monkeypatch.undo()
        assert log.append(2, {"loss": 2.0})
    assert [point.step for point in read_metrics(path)[0]] == [1, 2]


def test_a_killed_writer_loses_no_point_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys, pathlib, itertools; from minilm.orchestrator.stage.metrics_file import MetricsFile\n"
        f"log = MetricsFile(pathlib.Path({str(path)!r}))\n"
        "for step in itertools.count(1):\n"
        "    log.append(step, {'loss': 1 / step}); print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(200):
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    with MetricsFile(path) as log:
        assert log.last_step is not None and log.last_step >= said
    steps = [point.step for point in read_all_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
