"""One driver at a time: real processes that take, hold, lose and give back the lease of a work directory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilm.orchestrator.errors import LeaseHeld
from minilm.orchestrator.system import lease
from minilm.orchestrator.system.lease import Fence, Superseded, still_held, take
from minilm.orchestrator.system.write_errors import is_final, writing

HOLDER = """
import sys
from pathlib import Path
from minilm.orchestrator.system import lease, processes
lease.RENEW_SECONDS, lease.PATIENCE_SECONDS, machine = 0.05, float(sys.argv[3]), sys.argv[2]
if machine:
    processes.this_machine = lambda: machine
held = lease.take(Path(sys.argv[1]) / "lease")
print(held.path.stem, flush=True)
sys.stdin.read()
held.release()
"""


class Driver:
    """A process that takes the lease, on `machine` as it believes, and holds it until its standard input ends."""

    def __init__(self, work: Path, machine: str = "", patience: float = 30.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, work, machine, str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def epoch(self) -> int:
        return int(self.process.stdout.readline())

    def error(self) -> str:
        self.process.wait(timeout=240)  # by itself: `communicate` would end it
        out, errors = self.process.communicate()
        assert self.process.returncode, f"it has ended in good order: {out}"
        return errors.strip().splitlines()[-1]


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[type[Driver]]:
    made: list[Driver] = []

    class Tracked(Driver):
        def __init__(self, *given):
            super().__init__(tmp_path, *given)
            made.append(self)

    yield Tracked
    for driver in made:
        driver.process.kill()
        driver.process.communicate()


@pytest.fixture
def at_once(monkeypatch):
    """Whoever takes the lease here must not wait."""
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=time.monotonic, time_ns=time.time_ns))


def files(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "lease").iterdir())


def test_a_second_driver_is_refused_and_told_who_works_there(drivers, tmp_path, at_once):
    first = drivers()
    assert first.epoch() == 1
    with pytest.raises(LeaseHeld) as refused:
        take(tmp_path / "lease")
    assert refused.value.exit_code == 6
    expected = (
        f"another run works in {tmp_path} (process {first.process.pid} on {os.uname().nodename}, last sign of"
    )
    assert str(refused.value).startswith(expected)
    first.process.send_signal(signal.SIGSTOP)  # here its process is seen, so that it is never taken for dead
    time.sleep(1.3)
    with pytest.raises(LeaseHeld, match=r"last sign of life [1-9]\d* s ago"):
        take(tmp_path / "lease")
    assert files(tmp_path) == ["000001.json"]


def test_a_killed_driver_is_followed_at_once_and_a_released_lease_too(drivers, tmp_path, at_once):
    first = drivers()
    assert first.epoch() == 1
    first.process.kill()
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead as well
    second = take(tmp_path / "lease")
    assert files(tmp_path) == ["000002.json"]
    second.release()
    third = take(tmp_path / "lease")
    assert third.path.name == "000003.json"
    third.release()
    assert files(tmp_path) == ["000003.json"], "epochs only grow"


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    held = take(tmp_path / "lease")
    held._ended.set()
    held._thread.join()
    record = json.loads(held.path.read_text())
    record["holder"]["started"] = 1  # as if an older process had had our number
    held.path.write_text(json.dumps(record))
    after = take(tmp_path / "lease")
    assert after.path.name == "000002.json"
    after.release()


def test_a_driver_elsewhere_is_followed_only_after_its_silence(drivers, tmp_path):
    """The holder's machine is another, so its process number says nothing. Overtaken in its sleep, it ends."""
    first = drivers("host A")
    assert first.epoch() == 1
    assert "another run works in" in drivers("host B").error()  # it saw the file being touched
    first.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    second = drivers("host B", 1.0)
    assert second.epoch() == 2
    assert time.monotonic() - begun > 1.0
    assert files(tmp_path) == ["000002.json"]
    first.process.send_signal(signal.SIGCONT)
    assert first.error().endswith("has taken " + str(tmp_path) + " over; this one ends without writing")
    assert first.process.returncode == 6
    assert files(tmp_path) == ["000002.json"]


def test_a_challenger_that_has_slept_looks_again_before_it_takes_over(tmp_path, monkeypatch):
    """For longer than its patience, between two looks; meanwhile the holder, elsewhere, has touched its file."""
    now, path = [0.0], tmp_path / "lease" / "000001.json"
    path.parent.mkdir()
    path.touch()

    def oversleep(seconds):
        now[0] += 2 * lease.PATIENCE_SECONDS
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=oversleep))
    with pytest.raises(LeaseHeld, match="last sign of life 0 s ago"):
        lease.outlast(path)


def test_of_many_challengers_one_wins(drivers, tmp_path):
    dead = drivers()
    dead.epoch()
    dead.process.kill()
    dead.process.wait()
    rivals = [drivers() for _ in range(6)]
    deadline = time.monotonic() + 240
    while sum(rival.process.poll() is not None for rival in rivals) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (winner,) = (rival for rival in rivals if rival.process.poll() is None)
    assert winner.epoch() == 2
    assert files(tmp_path) == ["000002.json"]


def test_a_challenger_that_was_asleep_while_others_came_and_went_starts_over(tmp_path, monkeypatch):
    """It has judged epoch 1 dead; before it makes epoch 2, that one and a third have been taken."""
    folder = tmp_path / "lease"
    folder.mkdir()
    (folder / "000001.json").touch()

    def sleeps(path):
        if path.name == "000001.json":
            path.unlink()
            (folder / "000003.json").touch()

    monkeypatch.setattr(lease, "outlast", sleeps)
    held = take(folder)
    assert files(tmp_path) == ["000004.json"]
    held.release()


def test_a_file_that_says_nothing_is_waited_for(tmp_path, monkeypatch, capsys):
    """Its maker has died between making and filling it; or it is just about to."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.6)
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000001.json").touch()
    begun = time.monotonic()
    take(tmp_path / "lease").release()
    assert time.monotonic() - begun >= 0.6
    assert f"a process that is just starting had {tmp_path}: waiting 1 s" in capsys.readouterr().err


def test_who_has_lost_the_lease_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    lost: list[Path] = []
    held = take(tmp_path / "lease", on_lost=lost.append)
    held.check()
    Fence(str(held.path)).check()
    Fence("").check()
    assert still_held(held.path)
    held.path.rename(tmp_path / "lease" / "000002.json")
    held._thread.join(60)
    assert lost == [held.path]
    held.check()
    assert lost == [held.path] * 2
    with pytest.raises(Superseded, match="this worker ends without writing"):
        Fence(str(held.path)).check()
    held.release()
    assert files(tmp_path) == ["000002.json"], "a lost lease is not made anew"


@pytest.mark.parametrize("faults", [2, 1000])
def test_storage_that_does_not_say_who_may_write_is_asked_again_and_is_no_refused_write(
    tmp_path, monkeypatch, faults
):
    """What it raises in the end may pass: inside `writing`, too, which ends a run for good."""
    held, asked = take(tmp_path / "lease"), []

    def stale(path):
        asked.append(path)
        if len(asked) <= faults:
            raise OSError(errno.ESTALE, "Stale file handle")
        return still_held(path)

    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lease, "ANSWER_SECONDS", 60 if faults == 2 else 0.5)
    monkeypatch.setattr(lease, "still_held", stale)
    if faults == 2:
        Fence(str(held.path)).check()
        assert len(asked) == 3
        asked.clear()
        held.check()
        assert len(asked) == 3
    else:
        says = pytest.raises(OSError, match="does not say who may write .Stale file handle")
        with says as raised, writing(tmp_path):
            Fence(str(held.path)).check()
        assert not is_final(raised.value)
    held.release()


@pytest.mark.parametrize("owner", [None, "ours", "theirs"])
def test_a_fence_with_a_store_asks_who_owns_it(owner):
    fence = Fence("", SimpleNamespace(where="s3://bucket/stage", owner=lambda: owner), "ours")
    if owner != "theirs":
        fence.check()
        return
    with pytest.raises(LeaseHeld) as refused:
        fence.check()
    assert str(refused.value) == (
        "another run (theirs) has taken over the checkpoints in s3://bucket/stage; let one of the two go on, or give "
        "this one another compute.checkpoints"
    )
