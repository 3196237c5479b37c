"""What is freed stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

from minilm.orchestrator import cli
from minilm.orchestrator.launch import inline
from minilm.orchestrator.launch.ray_launcher import NICENESS, worker_environment
from minilm.orchestrator.system.malloc import SETTINGS
from minilm.orchestrator.worker import __main__ as worker_main

PROGRAM = """
import resource, sys, torch
from minilm.orchestrator.system.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_memory_that_is_freed_is_kept():
    """10 blocks of 16,384 pages each, one after the other; a busy machine may take some of them itself."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    given_back, kept = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, way], env=environment))
        for way in ("leave", "keep")
    )
    assert kept < given_back / 2  # with pages of 4 kB 163,840 are given back


def test_settings_in_the_users_environment_go_before(monkeypatch):
    """For workers under Ray, whose priority is among them."""
    for name in (*SETTINGS, NICENESS):
        monkeypatch.delenv(name, raising=False)
    ours = worker_environment()
    assert (ours["MALLOC_ARENA_MAX"], ours[NICENESS]) == ("1", "0") and set(ours) == {*SETTINGS, NICENESS}
    theirs = {"MALLOC_ARENA_MAX": "4", NICENESS: "7"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert worker_environment() == ours | theirs


def test_whatever_trains_keeps_its_memory_before_it_does_anything_else(tmp_path, monkeypatch):
    """A worker alone and `--launcher inline`; a driver of Ray does not train, and its workers get the environment."""
    kept: list[str] = []
    monkeypatch.setattr(worker_main, "keep_freed_memory", lambda: kept.append("worker"))
    monkeypatch.setattr(inline, "keep_freed_memory", lambda: kept.append("inline"))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "none.json")])
    assert worker_main.main() == 2
    for launcher in ("inline", "ray"):
        assert cli.main(["run", str(tmp_path / "none.yaml"), "--launcher", launcher]) == 2
    assert kept == ["worker", "inline"]
