"""How a stage's attempt begins, is watched and has ended: each end has its error and exit code."""

from __future__ import annotations

import errno
import resource
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilm.orchestrator.driver.curriculum import Driver
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.errors import InfrastructureError, NoProgress, Stopped, UserError
from minilm.orchestrator.launch.attempt import begin_attempt, check_outcome
from minilm.orchestrator.launch.base import LAUNCHERS, Launcher, LaunchOptions, load_launcher
from minilm.orchestrator.stage.folder import RunFolder, StageFolder
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.system.signals import StopRequest
from tests.support import NO_DATA, make_spec

OPTIONS = LaunchOptions(RunFolder(Path("none")), "cpu", (1, 1), wait_seconds=1.0)
RAY, INLINE = (load_launcher(name)(OPTIONS, StopRequest()) for name in ("ray", "inline"))


def test_every_row_of_the_table_is_a_launcher():
    for name in LAUNCHERS:
        assert issubclass(load_launcher(name), Launcher)


def ended(error: BaseException | None = None) -> Future[None]:
    future: Future[None] = Future()
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


@pytest.fixture
def spec(tmp_path):
    return make_spec(NO_DATA, tmp_path, tmp_path, attempt="mine")


@pytest.mark.parametrize("kind", [UserError, NoProgress, InfrastructureError])
def test_a_failure_that_a_worker_left_keeps_its_words_and_exit_code(spec, tmp_path, kind):
    folder = StageFolder(tmp_path)
    write_json(folder.failure, {"attempt": "mine", "message": "why", "exit_code": kind.exit_code})
    with pytest.raises(kind, match="^why$") as raised:
        check_outcome(spec, folder, ended(), RAY)
    assert raised.value.exit_code == kind.exit_code


def test_a_failure_of_an_older_attempt_is_not_believed(spec, tmp_path):
    """A worker left over from a killed driver may write late."""
    folder = StageFolder(tmp_path)
    write_json(folder.failure, {"attempt": "older", "message": "why", "exit_code": 2})
    folder.done.touch()
    check_outcome(spec, folder, ended(), RAY)


def test_neither_done_nor_failed_is_stopped(spec, tmp_path):
    with pytest.raises(Stopped, match="stage first is stopped; the same command goes on"):
        check_outcome(spec, StageFolder(tmp_path), ended(), RAY)


@pytest.mark.parametrize("text", ["many\nlines", ""])
def test_rays_error_becomes_one_line(spec, tmp_path, text):
    with pytest.raises(InfrastructureError, match="Ray gave up") as raised:
        check_outcome(spec, StageFolder(tmp_path), ended(RuntimeError(text)), RAY)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("word", ["word ", "/path"])
def test_of_a_long_error_the_end_is_told(spec, tmp_path, word):
    error = RuntimeError(word * 100 + "cause")
    with pytest.raises(
        InfrastructureError, match=rf"gave up \(… {word}({word})+cause\); the workers' logs"
    ) as raised:
        check_outcome(spec, StageFolder(tmp_path), ended(error), RAY)
    assert str(raised.value).count(word) < 50


def test_a_defect_of_ours_keeps_its_traceback_inline(spec, tmp_path):
    with pytest.raises(ZeroDivisionError):
        check_outcome(spec, StageFolder(tmp_path), ended(ZeroDivisionError()), INLINE)


def test_storage_that_went_away_is_no_defect_inline(spec, tmp_path):
    with pytest.raises(
        InfrastructureError, match="storage gave up .*Stale file handle.*; the same command goes"
    ):
        error = OSError(errno.ESTALE, "Stale file handle")
        check_outcome(spec, StageFolder(tmp_path), ended(error), INLINE)


def test_a_job_that_finds_no_room_leaves_the_one_before(spec, tmp_path):
    """Half a stage.json would be read by every later command, and end it."""
    folder = StageFolder(tmp_path)
    begin_attempt(spec, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            begin_attempt(replace(spec, attempt="next"), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(folder.spec)["attempt"] == "mine"


def test_storage_that_is_away_for_a_moment_does_not_end_the_watch(spec, tmp_path):
    asked = []
    future: Future[None] = Future()

    def check() -> None:
        asked.append(len(asked))
        if len(asked) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        future.set_result(None)

    driver = Driver(
        recipe=None, workdir=None, lease=SimpleNamespace(check=check), data=NO_DATA, stages=(), licences=[],
        tracking=None, launcher=INLINE, line=StatusLine(), stop=SimpleNamespace(requested=True),
    )  # fmt: skip
    driver.watch(future, spec, "first")
    assert len(asked) == 2 and StageFolder(tmp_path).stop_request.exists()
