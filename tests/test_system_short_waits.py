"""Threads on a crowded machine: when idle teams come and go, and that they shorten waits."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from minilm.orchestrator.system import short_waits
from minilm.orchestrator.system.short_waits import short_waits_where_crowded, waited_seconds


def test_teams_are_there_while_threads_wait_for_a_core(monkeypatch):
    open_teams: list[object] = []
    clock, seen = {"waited": 5.0, "now": 100.0}, []
    shares = iter([0.02, 0.18, 0.9, 0.5, 0.1, 0.06, 0.02, 0.9])  # of both threads together

    class Team:
        def __init__(self):
            open_teams.append(self)

        def close(self):
            open_teams.remove(self)

    class Ended(threading.Event):
        def wait(self, seconds):
            seen.append(len(open_teams))
            share = next(shares, None)
            clock["now"] += seconds
            clock["waited"] += seconds * (share or 0.0)
            return share is None

    monkeypatch.setattr(short_waits, "IdleTeam", Team)
    monkeypatch.setattr(short_waits, "waited_seconds", lambda: clock["waited"])
    monkeypatch.setattr(short_waits.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(short_waits.os, "cpu_count", lambda: 8)
    short_waits._watch(2, Ended())
    assert seen == [0, 0, 0, 4, 4, 4, 0, 0, 4]  # 2 threads and 4 teams of 2 are more than 8 cores
    assert not open_teams


def test_nobody_watches_one_thread_or_a_system_that_does_not_tell(monkeypatch, tmp_path):
    def names():
        return {thread.name for thread in threading.enumerate()}

    with short_waits_where_crowded(1):
        assert "short-waits" not in names()
    if sys.platform == "linux":
        assert waited_seconds() >= 0
        with short_waits_where_crowded(2):
            assert "short-waits" in names()
        assert "short-waits" not in names()
    monkeypatch.setattr(short_waits, "TASKS", tmp_path / "none")
    assert waited_seconds() is None
    with short_waits_where_crowded(2):
        assert "short-waits" not in names()


PROGRAM = """
import os, resource, sys
import torch
from minilm.orchestrator.system.short_waits import IdleTeam
torch.set_num_threads(2)
x = torch.ones(1 << 17)
def switches():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(3000):
        x.mul_(1.0)   # both threads
        x[:20000].mul_(1.0)   # one of them: the other waits
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
switches()
spinning, teams = switches(), [IdleTeam() for _ in range(os.cpu_count() // 2)]
yielding = switches()
for team in teams:
    team.close()
print(spinning, yielding, switches())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is PyTorch's OpenMP library on Linux")
def test_libgomp_gives_the_core_away_while_idle_teams_are_there():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    spinning, yielding, again = map(int, done.stdout.split())
    assert yielding > 1000 and yielding > 3 * max(spinning, again), done.stdout
