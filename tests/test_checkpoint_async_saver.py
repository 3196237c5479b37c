"""Saves in the background: the copy is the state of its step, errors come out, any death leaves a whole checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.checkpoint.format import read
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.store import step_of
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.worker.error_file import run_reporting
from minilm.orchestrator.worker.loop import run_stage
from minilm.orchestrator.worker.save_policy import SavePolicy
from tests.support import NO_DATA, checkpoints_in, make_spec
from tests.test_checkpoint import FACTS, MINE, advance, make, save

OPEN = Fence("")


def make_saver(folder: Path, models, states, *, keep: int = 2, keep_every=None, fence=OPEN) -> AsyncSaver:
    return AsyncSaver(LocalStore(folder), models, states, MINE, keep=keep, keep_every=keep_every, fence=fence)


def test_struck_at_any_operation_of_a_save_the_next_start_finds_a_whole_one(tmp_path):
    command = [sys.executable, "-m", "tests.crash_saves", str(tmp_path)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    rounds: dict[str, list[tuple[str, dict]]] = {"kill": [], "full": []}
    for line in run.stdout.splitlines():
        what, end = json.JSONDecoder().raw_decode(line) if line.startswith('"') else ("nothing", 0)
        found = json.loads(line[end:])
        rounds[found["fault"]].append((what, found))
    for fault, results in rounds.items():
        struck = [what for what, _ in results]
        assert struck[-1] == "nothing"
        assert {"mkdir", "open", "write s.model.safetensors", "write", "fsync"} <= set(struck)
        for what, found in results:
            assert found["sound"], (what, found)
            assert found["cleaned"], (what, found)
            assert found["status"] == {"kill": -9, "full": 28}[fault] or what == "nothing", (what, found)
            if fault == "full":  # an error, not a death: nothing half-done stays
                assert found["left"] == [], (what, found)
        steps = [found["step"] for _, found in results]
        assert steps == sorted(steps)
        assert set(steps) == {2, 3}
    assert {"rename", "unlink", "rmdir"} <= {what for what, _ in rounds["kill"]}


def test_the_copy_is_the_state_of_its_step_however_slow_the_disk(tmp_path, monkeypatch):
    models, states = make(0)
    gate = threading.Event()
    original = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *a: gate.wait(10) and original(*a))
    advance(states, 0)
    expected = {k: v.clone() for k, v in models["s"].state_dict().items()}
    own = make_saver(tmp_path, models, states)
    own.save(1, FACTS, lambda copy: None)
    assert own.busy
    advance(states, 1)
    gate.set()
    own.wait()
    assert not own.busy
    others, other_states = make(5)
    assert checkpoint.restore_newest(LocalStore(tmp_path), others, other_states, MINE) == (1, FACTS)
    assert all(torch.equal(v, others["s"].state_dict()[k]) for k, v in expected.items())
    assert not torch.equal(expected["0.weight"], models["s"].state_dict()["0.weight"])


def test_one_save_at_a_time_and_each_with_its_own_state(tmp_path, monkeypatch):
    running: list[int] = []
    original = checkpoint.write_tensors

    def slow(*arguments):
        running.append(sum(thread.name == "minilm-checkpoint" for thread in threading.enumerate()))
        time.sleep(0.02)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    models, states = make(0)
    own = make_saver(tmp_path, models, states, keep=9)
    weights = []
    for step in (1, 2, 3):
        advance(states, step)
        weights.append(models["s"].state_dict()["0.weight"].clone())
        own.save(step, FACTS, lambda copy: None)
    own.wait()
    assert max(running) == 1
    for path, weight in zip(checkpoints_in(tmp_path), weights, strict=True):
        assert torch.equal(read(path)[1]["s.model.safetensors"]["0.weight"], weight)


@pytest.mark.parametrize("where", ["check", "fence", "disk"])
def test_an_error_is_kept_for_the_loop_raised_once_and_leaves_nothing(tmp_path, monkeypatch, where):
    def fail(*_):
        raise UserError("no")

    if where == "disk":
        monkeypatch.setattr(checkpoint, "write_tensors", fail)
    own = make_saver(tmp_path, *make(0), fence=SimpleNamespace(check=fail) if where == "fence" else OPEN)
    own.save(1, FACTS, fail if where == "check" else lambda copy: None)
    own.close()
    assert own.failed
    with pytest.raises(UserError, match="no"):
        own.wait()
    own.wait()
    assert not own.failed
    assert list(tmp_path.iterdir()) == []


def test_every_nth_stays_beside_the_newest(tmp_path):
    models, states = make(0)
    for step in range(1, 11):
        save(tmp_path, step, models, states, keep=2, keep_every=4)
    assert [step_of(p.name) for p in checkpoints_in(tmp_path)] == [4, 8, 9, 10]


def test_steps_that_find_a_slow_save_in_flight_wait_for_it_once(tmp_path):
    """With a slow store every due step would wait, and the loop with it."""
    spec = make_spec(NO_DATA, tmp_path, tmp_path, checkpoint_every_steps=2)
    waited: list[float] = []
    saver = SimpleNamespace(busy=True, wait_a_little=waited.append)
    save_policy = SavePolicy(spec, None, saver)
    assert not any(save_policy.is_due(done, False) for done in range(1, 9))
    assert len(waited) == 1
    saver.busy = False
    assert save_policy.is_due(9, False)  # later, and not at the next due step


def test_the_loop_makes_and_keeps_every_nth(shards, teacher, tmp_path):
    spec = make_spec(
        shards, teacher, tmp_path, checkpoint_every_steps=3, keep_every_steps=5, keep_checkpoints=1, steps=11
    )
    assert run_stage(spec)
    kept = checkpoints_in(StageFolder(tmp_path).checkpoints)
    assert [step_of(path.name) for path in kept] == [5, 10, 11]


def test_a_run_killed_between_its_last_save_and_its_export_exports(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, steps=6)
    assert run_stage(spec)
    done = StageFolder(tmp_path).done
    before = done.read_text()
    done.unlink()
    shutil.rmtree(tmp_path / "students")
    seen: list[int] = []
    assert run_stage(spec, seen.append)
    assert seen == []
    assert done.read_text() == before
    assert (StageFolder(tmp_path).student("small") / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(tmp_path):
    models, states = make(0)
    for step in (1, 2):
        advance(states, step)
        newest = save(tmp_path, step, models, states)
    (newest / "s.model.safetensors").unlink()
    assert checkpoint.restore_newest(LocalStore(tmp_path), models, states, MINE) == (1, FACTS)
    assert (tmp_path / "damaged-step-000000002").is_dir()
    advance(states, 2)
    save(tmp_path, 2, models, states)
    assert checkpoint.restore_newest(LocalStore(tmp_path), models, states, MINE) == (2, FACTS)


def test_a_failing_disk_ends_the_loop_at_its_next_step_in_one_line(shards, teacher, tmp_path, monkeypatch):
    """The first save is sound, the second hits a full disk."""
    original = checkpoint.write_tensors
    calls: list[Path] = []

    def fills_up(path, tensors):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", fills_up)
    seen: list[int] = []
    spec = make_spec(shards, teacher, tmp_path, steps=60)

    def on_step(step: int) -> None:
        seen.append(step)
        for thread in threading.enumerate():
            if thread.name == "minilm-checkpoint":
                thread.join()

    assert not run_reporting(spec, on_step)
    folder = StageFolder(tmp_path)
    failure = json.loads(folder.failure.read_text())
    assert failure["exit_code"] == 2
    assert "no space left on the disk of" in failure["message"]
    assert seen[-1] == 6
    assert [p.name for p in checkpoints_in(folder.checkpoints)] == ["step-000000003"]
    monkeypatch.undo()
    folder.failure.unlink()
    assert run_reporting(spec)
