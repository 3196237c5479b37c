"""A stage that cannot go on ends with an error that says why: stalls, starts that fail again and again."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilm.model.encoder.build import load_encoder
from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.launch.base import LaunchOptions
from minilm.orchestrator.launch.ray_launcher import RayLauncher
from minilm.orchestrator.stage.folder import RunFolder, StageFolder
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.train.build import build_distiller, build_objective
from minilm.orchestrator.worker import error_file, loop
from minilm.orchestrator.worker import watchdog as watchdog_module
from minilm.orchestrator.worker.crash_loop import reached
from minilm.orchestrator.worker.error_file import log_to_file, run_reporting
from minilm.orchestrator.worker.errors import PeerFailed
from minilm.orchestrator.worker.watchdog import Watchdog
from tests import worker_pool
from tests.support import NO_DATA, change, make_spec


def test_a_worker_that_makes_no_step_ends_itself_and_leaves_its_stack(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, stall_seconds=2.0)
    assert worker_pool.join(worker_pool.start(spec, 1, hangs_after=5)) == [1]
    log = StageFolder(tmp_path).worker_log(0).read_text()
    assert "Timeout (0:00:02)!" in log
    assert "in hang_here" in log
    assert run_reporting(change(spec, stall_seconds=300.0))  # what a supervisor starts in its place goes on


def test_a_step_has_most_of_the_time_that_it_was_given(tmp_path, monkeypatch):
    """Setting the alarm again is not free, and so not done at every step."""
    now, armed = 0.0, []
    monkeypatch.setattr("minilm.orchestrator.system.timer.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Watchdog, "_arm", lambda self, seconds: armed.append(now))
    for seconds in (2.0, 300.0):
        watchdog = Watchdog(tmp_path / "log", seconds)
        watchdog._armed, armed[:] = seconds, []
        for _ in range(12):
            now += 0.25
            watchdog.alive()
        longest = max(b - a for a, b in zip(armed, armed[1:], strict=False))
        assert longest == min(1.0, seconds / 4)


@pytest.mark.parametrize(("is_rank_zero", "expected"), [(True, "sss"), (False, "sls")])
def test_ranks_that_do_not_save_expect_to_wait_for_a_checkpoint_that_is_kept(
    tmp_path, monkeypatch, is_rank_zero, expected
):
    """After step 3, with a slow store. Rank 0 waits for the save before and allows for that itself."""
    armed = ""

    def arm(self, seconds):
        nonlocal armed
        self._armed = seconds
        armed += "s" if seconds == 300.0 else "l"

    monkeypatch.setattr(Watchdog, "_arm", arm)
    monkeypatch.setattr(watchdog_module, "REARM_SECONDS", 0.0)
    watchdog = Watchdog(tmp_path / "log", 300.0)
    armed = ""
    run = SimpleNamespace(
        spec=make_spec(NO_DATA, tmp_path, tmp_path, keep_every_steps=3),
        world=SimpleNamespace(is_rank_zero=is_rank_zero),
        watchdog=watchdog,
        crash_loop_guard=None,
    )
    for step in (2, 3, 4):
        loop.StageRun.begin_step(run, step)
    assert armed == expected


@pytest.mark.parametrize(("stall_seconds", "expected"), [(600.0, 6000.0), (2.0, 300.0)])
def test_workers_wait_for_each_other_as_long_as_one_may_be_busy(
    tmp_path, monkeypatch, stall_seconds, expected
):
    """While rank 0 fetches a large checkpoint the others wait, with and without Ray."""
    asked: list[float] = []

    def joins(backend, timeout):
        asked.append(timeout.total_seconds())
        raise ZeroDivisionError

    def trains(*arguments, torch_config, **options):
        asked.append(torch_config.timeout_s)
        raise ZeroDivisionError

    monkeypatch.setattr(torch.distributed, "init_process_group", joins)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", trains)
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads = torch.get_num_threads()
    spec = make_spec(NO_DATA, tmp_path, tmp_path, stall_seconds=stall_seconds, threads=threads)
    with pytest.raises(ZeroDivisionError):
        loop.run_stage(spec)
    launcher = RayLauncher(LaunchOptions(RunFolder(tmp_path), "cpu", (2, 2), 0.0), StopRequest())
    launcher.resource = "trainer"
    with pytest.raises(ZeroDivisionError):
        launcher.start(spec)
    assert asked == [expected, expected]


def test_a_save_that_waits_for_the_one_before_has_a_long_time(shards, teacher, tmp_path, monkeypatch):
    armed: list[float] = []
    while_saving: list[float] = []
    arm, save = Watchdog._arm, AsyncSaver.save

    def noted(self, seconds):
        armed.append(seconds)
        arm(self, seconds)

    def saves(self, *arguments, **options):
        while_saving.append(armed[-1])
        armed.append(0.0)
        save(self, *arguments, **options)

    def steps(step):
        if step == 3:
            assert armed[-1] == 300.0  # a step's again

    monkeypatch.setattr(Watchdog, "_arm", noted)
    monkeypatch.setattr(AsyncSaver, "save", saves)
    monkeypatch.setattr(AsyncSaver, "busy", True)  # so only the one at the end is made, and it waits
    assert run_reporting(make_spec(shards, teacher, tmp_path, steps=6), steps)
    assert while_saving == [3000.0]


def test_a_start_that_fails_three_times_the_same_way_is_not_tried_for_ever(
    shards, teacher, tmp_path, monkeypatch
):
    spec = make_spec(shards, teacher, tmp_path)
    texts = ["a", "broken", "broken", "broken"]

    def fails(*_):
        raise RuntimeError(f"first line\n{texts.pop(0)}")

    monkeypatch.setattr(loop, "build_distiller", fails)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run_reporting(spec)
    assert not run_reporting(spec)
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 4
    assert (
        "could not start, 3 times in a row, because of RuntimeError: broken; the whole" in failure["message"]
    )
    monkeypatch.undo()
    assert not run_reporting(spec)  # of this attempt nothing is started any more
    assert run_reporting(replace(spec, attempt="next"))


def test_reaching_the_loop_forgets_failed_starts(shards, teacher, tmp_path, monkeypatch):
    spec = make_spec(shards, teacher, tmp_path)

    def fails(*_):
        raise RuntimeError("broken")

    def dies(step):
        raise RuntimeError("broken")

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(loop, "build_distiller", fails)
            run_reporting(spec)
        with pytest.raises(RuntimeError):
            run_reporting(spec, dies)
    assert run_reporting(spec)


@pytest.mark.parametrize("error", [PeerFailed("rank 0 failed to save"), RuntimeError("closed")])
def test_a_rank_waits_for_the_report_that_a_peer_has_promised(tmp_path, monkeypatch, error):
    """Five seconds, of a disk that is slow; whoever has only lost a connection does not wait so long."""
    spec, now = make_spec(NO_DATA, tmp_path, tmp_path), 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds
        if now > 5:
            write_json(StageFolder(tmp_path).failure, {"attempt": spec.attempt})

    def fails(*_):
        raise error

    monkeypatch.setattr(loop, "run_stage", fails)
    monkeypatch.setattr(error_file, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setenv("WORLD_SIZE", "2")
    if isinstance(error, PeerFailed):
        assert not run_reporting(spec)
    else:
        with pytest.raises(RuntimeError, match="closed"):
            run_reporting(spec)
        assert now < 5


def test_students_start_from_the_teachers_layers_where_the_recipe_says_so(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, students=(("small", 2, 48),))
    own = replace(spec, students=tuple(replace(s, init="teacher-layers") for s in spec.students))
    expected = load_encoder(teacher).model.get_input_embeddings().weight
    for given, same in ((spec, False), (own, True)):
        model = build_distiller(given, torch.device("cpu")).students["small"].model
        assert torch.equal(model.get_input_embeddings().weight, expected) is same


def test_a_save_that_fails_on_rank_zero_ends_all_ranks_at_their_next_step(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, steps=2000)
    (tmp_path / "checkpoints").write_text("not a folder")
    assert worker_pool.join(worker_pool.start(spec, 2)) == [3, 3]
    assert reached(tmp_path) < 1000
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 10
    assert f"{tmp_path / 'checkpoints'} cannot be written (File exists): mend the disk" in failure["message"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "heartbeat.json", "reached", "attempts.json", "students"])
def test_storage_that_cannot_be_written_ends_the_run_at_once(shards, teacher, tmp_path, name):
    """A file where a folder should be and the other way round: even root can't write there."""
    spec = make_spec(shards, teacher, tmp_path, steps=3)
    if name == "students":
        (tmp_path / name).write_text("not a folder")
    else:
        (tmp_path / name).mkdir()
    assert not run_reporting(spec)
    failure = json.loads(StageFolder(tmp_path).failure.read_text())
    assert failure["exit_code"] == 10
    assert str(tmp_path / name) in failure["message"]
    assert "permissions and run the same command again" in failure["message"]
    if name != "attempts.json":
        record = tmp_path / "attempts.json"
        assert not record.exists() or json.loads(record.read_text())["running"] is False


def test_an_error_of_reading_may_pass_and_counts_as_a_death(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path)

    def stale(step):
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(OSError, match="Stale"):
        run_reporting(spec, stale)
    assert not StageFolder(tmp_path).failure.exists()
    assert json.loads((tmp_path / "attempts.json").read_text())["running"] is True


def test_an_error_that_cannot_even_be_reported_is_raised(shards, teacher, tmp_path, monkeypatch):
    spec = make_spec(shards, teacher, tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()

    def fails(path, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(error_file, "write_json", fails)
    with pytest.raises(
        InfrastructureError, match=r"metrics\.jsonl cannot .*failure\.json cannot be written: Read-only"
    ):
        run_reporting(spec)


def test_a_log_file_that_cannot_be_opened_is_no_error(shards, teacher, tmp_path, caplog):
    (tmp_path / "worker-0.log").mkdir()
    log_to_file(make_spec(shards, teacher, tmp_path))
    assert "no log file: [Errno 21] Is a directory" in caplog.text


def test_soft_labels_without_a_mask_token_are_refused_in_one_line(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, objective={"name": "soft-label-mlm"})
    found = build_objective(spec)
    assert (found.mask_token_id, found.special_ids) == (4, (0, 1, 2, 3, 4))
    data = replace(spec.data, vocabulary=spec.data.vocabulary._replace(mask_id=-1))
    with pytest.raises(UserError, match=r"^stage first: objective soft-label-mlm masks tokens, .*minilm$"):
        build_objective(replace(spec, data=data))
