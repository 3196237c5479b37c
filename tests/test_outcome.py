"""How a stage's attempt ended, from what its workers left: each way has its error and exit code."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from support import NO_DATA, make_job

from orchestrator.curriculum import check_outcome
from orchestrator.errors import InfrastructureError, NoProgress, Stopped, UserError
from orchestrator.files import write_json
from orchestrator.stage import StageFolder


def ended(error: BaseException | None = None) -> Future[None]:
    future: Future[None] = Future()
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


@pytest.fixture
def job(tmp_path):
    return make_job(NO_DATA, tmp_path, tmp_path, attempt="mine")


@pytest.mark.parametrize("kind", [UserError, NoProgress, InfrastructureError])
def test_a_failure_that_a_worker_left_keeps_its_words_and_exit_code(job, tmp_path, kind):
    folder = StageFolder(tmp_path)
    write_json(folder.failure, {"attempt": "mine", "message": "why", "exit_code": kind.exit_code})
    with pytest.raises(kind, match="^why$") as raised:
        check_outcome(job, folder, ended(), inline=False)
    assert raised.value.exit_code == kind.exit_code


def test_a_failure_of_an_older_attempt_is_not_believed(job, tmp_path):
    """A worker left over from a killed driver may write late."""
    folder = StageFolder(tmp_path)
    write_json(folder.failure, {"attempt": "older", "message": "why", "exit_code": 2})
    folder.done.touch()
    check_outcome(job, folder, ended(), inline=False)


def test_neither_done_nor_failed_is_stopped(job, tmp_path):
    with pytest.raises(Stopped, match="stage first is stopped; the same command goes on"):
        check_outcome(job, StageFolder(tmp_path), ended(), inline=False)


@pytest.mark.parametrize("text", ["many\nlines", ""])
def test_rays_error_becomes_one_line(job, tmp_path, text):
    with pytest.raises(InfrastructureError, match="Ray gave up") as raised:
        check_outcome(job, StageFolder(tmp_path), ended(RuntimeError(text)), inline=False)
    assert "\n" not in str(raised.value)


def test_a_defect_of_ours_keeps_its_traceback_inline(job, tmp_path):
    with pytest.raises(ZeroDivisionError):
        check_outcome(job, StageFolder(tmp_path), ended(ZeroDivisionError()), inline=True)
