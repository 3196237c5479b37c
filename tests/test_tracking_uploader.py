"""The uploader: every point once, in order, whatever the receiver does; no MLflow needed to show it."""

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilm.orchestrator.stage.metrics_file import MetricsFile, Point
from minilm.orchestrator.system.text import one_line, shown
from minilm.orchestrator.tracking.uploader import Uploader

QUICK = {"poll_seconds": 0.01, "first_retry_seconds": 0.01, "last_retry_seconds": 0.05}


class Receiver:
    """Takes points, or raises while it is away; keeps what it was given."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.batches: list[int] = []
        self.calls = 0
        self.away = False

    def send(self, points: list[Point]) -> None:
        self.calls += 1
        if self.away:
            raise ConnectionError("nobody\nhere")
        self.points += points
        self.batches.append(sum(len(point.metrics) for point in points))

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]


def until(true: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def test_points_go_while_they_are_written_and_close_sends_the_rest(tmp_path: Path) -> None:
    receiver = Receiver()
    files = [tmp_path / "metrics.jsonl", tmp_path / "heldout.jsonl"]
    uploader = Uploader(
        files, receiver.send, tmp_path / "sent.json", **QUICK
    ).start()  # before the files exist
    with MetricsFile(files[0]) as log, MetricsFile(files[1]) as heldout:
        for step in range(1, 31):
            log.append(step, {"a": step, "b": step})
            if step % 10 == 0:
                heldout.append(step, {"heldout": step})
            if step == 20:
                until(lambda: len(receiver.points) == 22)
        assert uploader.close(10) == 0
    assert sorted(receiver.steps) == sorted([*range(1, 31), 10, 20, 30])
    assert uploader.num_sent == 33


def test_batches_hold_at_most_so_many_numbers(tmp_path: Path) -> None:
    receiver = Receiver()
    with MetricsFile(tmp_path / "m.jsonl") as log:
        for step in range(100):
            log.append(step, {f"m{i}": 0.0 for i in range(7)})
        log.append(100, {f"m{i}": 0.0 for i in range(90)})
    Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json", batch_metrics=50).drain()
    assert receiver.steps == list(range(101))
    assert receiver.batches == [49] * 14 + [14] + [90]


def test_it_retries_for_ever_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    receiver = Receiver()
    receiver.away = True
    with MetricsFile(tmp_path / "m.jsonl") as log:
        uploader = Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json", **QUICK).start()
        for step in range(10):
            log.append(step, {"loss": step})
        until(lambda: receiver.calls > 5)
        receiver.away = False
        until(lambda: receiver.steps == list(range(10)))
    assert uploader.close(10) == 0
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "points could not be sent" in text]) == 1
    assert "nobody here" in texts[0] and "\n" not in texts[0]
    assert texts[-1] == "tracking takes points again"


def test_points_that_could_not_be_sent_wait_for_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()
    with MetricsFile(tmp_path / "m.jsonl") as log:
        uploader = Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json", **QUICK).start()
        log.append(1, {"loss": 1})
        until(lambda: receiver.steps == [1])
        receiver.away = True
        log.append(2, {"loss": 2})
        log.append(3, {"loss": 3})
        began = time.monotonic()
        assert uploader.close(0.3) == 2
        assert time.monotonic() - began < 20
        uploader._thread.join()  # its last try may still be under way
    assert "2 points could not be sent" in caplog.text
    receiver.away = False
    Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json").drain()
    assert receiver.steps == [1, 2, 3]


def test_a_retry_that_comes_after_the_deadline_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the wait before it takes longer than it should."""
    receiver, now, calls = Receiver(), [0.0], []
    receiver.away = True

    def oversleep(seconds: float) -> None:
        calls.append(receiver.calls)
        now[0] += 60

    monkeypatch.setattr(
        "minilm.orchestrator.tracking.uploader.time",
        SimpleNamespace(monotonic=lambda: now[0], sleep=oversleep),
    )
    with MetricsFile(tmp_path / "m.jsonl") as log:
        uploader = Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json", **QUICK).start()
        log.append(1, {"loss": 1})
        assert uploader.close(30) == 1
        uploader._thread.join()
    assert calls == [receiver.calls]


def test_a_receiver_that_hangs_blocks_neither_writer_nor_close(tmp_path: Path) -> None:
    release = threading.Event()
    with MetricsFile(tmp_path / "m.jsonl") as log:
        uploader = Uploader(
            [tmp_path / "m.jsonl"], lambda points: release.wait(30), tmp_path / "s.json", **QUICK
        ).start()
        began = time.monotonic()
        for step in range(200):
            log.append(step, {"loss": step})
        assert uploader.close(0.2) == 200
        assert time.monotonic() - began < 20
    release.set()


def test_a_batch_that_arrived_is_not_sent_again_after_a_failure(tmp_path: Path) -> None:
    receiver = Receiver()
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as log:
        for step in range(4):
            log.append(step, {"a": 0.0, "b": 0.0})

    def only_two(points: list[Point]) -> None:
        if len(receiver.points) == 2:
            raise ConnectionError
        receiver.send(points)

    with pytest.raises(ConnectionError):
        Uploader([path], only_two, tmp_path / "s.json", batch_metrics=4).drain()
    Uploader([path], receiver.send, tmp_path / "s.json", batch_metrics=4).drain()
    assert receiver.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"m.jsonl": "x"}', '{"m.jsonl": [1]}'])
def test_a_damaged_state_sends_again(tmp_path: Path, content: str) -> None:
    receiver = Receiver()
    with MetricsFile(tmp_path / "m.jsonl") as log:
        log.append(5, {"loss": 1})
    (tmp_path / "s.json").write_text(content)
    Uploader([tmp_path / "m.jsonl"], receiver.send, tmp_path / "s.json").drain()
    assert receiver.steps == [5]


def test_a_file_cut_short_and_written_again_gives_no_step_twice(tmp_path: Path) -> None:
    receiver = Receiver()
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as log:
        for step in range(10):
            log.append(step, {"loss": step + 1 / 3})
    Uploader([path], receiver.send, tmp_path / "s.json").drain()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))  # a power failure took the end; the run was resumed at step 3
    with MetricsFile(path) as log:
        for step in range(3, 15):
            log.append(step, {"loss": 1})  # shorter lines: the old end now lies behind the line of step 10
    Uploader([path], receiver.send, tmp_path / "s.json").drain()
    assert receiver.steps == list(range(15))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://user:s3cret@host:5000/base", "http://host:5000/base"),
        ("https://s3cret@host", "https://host"),
        ("postgresql://user:s3/cr@et@host/db", "postgresql://host/db"),
        ("postgresql://host/db?user=u&password=s3cret&ssl=1", "postgresql://host/db?user=u&password=…&ssl=1"),
        ("sqlite:////work dir/user:a@b/mlflow.db", "sqlite:////work dir/user:a@b/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_passwords_of_addresses_are_not_shown(given: str, expected: str) -> None:
    assert shown(given) == expected
    said = f"API request to {given} failed,\nask models:/m@newest"
    assert one_line(ConnectionError(said)) == f"API request to {expected} failed, ask models:/m@newest"
