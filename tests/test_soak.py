"""The soak: its fault schedule is reproducible, its invariants find every violation, and a short one is run."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from minilm.orchestrator import cli
from minilm.orchestrator.checkpoint.format import DAMAGE, read, sealed
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.processes import status
from tests.soak import soak
from tests.soak.corruption import damage_newest
from tests.soak.faults import HASTY, PAUSE_SECONDS, WEIGHTS, Fault, fault_schedule
from tests.soak.invariants import check_round
from tests.soak.recipe import write_soak_recipe
from tests.soak.report import Recovery, Report
from tests.soak.round import Progress, Round
from tests.soak.soak import check_room
from tests.soak.testbed import Testbed


def test_the_fault_schedule_is_a_function_of_the_seed():
    first = list(itertools.islice(fault_schedule(7, list(WEIGHTS)), 300))
    assert first == list(itertools.islice(fault_schedule(7, list(WEIGHTS)), 300))
    assert first != list(itertools.islice(fault_schedule(8, list(WEIGHTS)), 300))
    assert {fault.kind for fault in first} == set(WEIGHTS)
    assert [fault.number for fault in first] == list(range(1, 301))
    assert all(PAUSE_SECONDS[0] <= fault.pause <= PAUSE_SECONDS[1] and 0 <= fault.pick < 1 for fault in first)
    hasty = {fault.kind for fault in first if fault.hasty}
    assert hasty == set(HASTY), "these, and only these, can fault a run that is just starting"
    assert {fault.kind for fault in itertools.islice(fault_schedule(7, ["driver"]), 20)} == {"driver"}
    assert first[0].text() == "#1 worker: 1.0 s of steps, pick 0.072, duration 14.4 s"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # by no clock: slow steps would have more checkpoints
    every = {"checkpoint_every_steps": 20, "checkpoint_every_seconds": 3600}
    return write_soak_recipe(tmp_path_factory.mktemp("soak"), steps=400, **every)


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file, [])


@pytest.fixture(scope="module")
def without_faults(recipe_file: Path) -> Workdir:
    work = recipe_file.parent / "without-faults"
    assert cli.main(["run", str(recipe_file), "--workdir", str(work), "--launcher", "inline"]) == 0
    return Workdir(work)


def store(work: Workdir) -> str:
    return f"sqlite:///{work.root / 'mlflow.db'}"


def test_nothing_is_found_where_nothing_is_wrong(recipe, without_faults):
    found = check_round(recipe, without_faults, without_faults, store(without_faults))
    assert found == {name: [] for name in ("rows", "metrics", "MLflow", "weights", "teacher", "tidiness")}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def a_point_doubled(work: Workdir) -> None:
    path = work.stage("assistant").step_metrics
    path.write_text("".join([*lines(path), lines(path)[1]]))


def a_point_lost(work: Workdir) -> None:
    path = work.stage("assistant").heldout_metrics
    path.write_text("".join(lines(path)[:-1]))


def a_number_lost(work: Workdir) -> None:
    path = work.stage("assistant").step_metrics
    point = json.loads(lines(path)[0])
    del point["metrics"]["assistant/loss"]
    path.write_text("".join([json.dumps(point) + "\n", *lines(path)[1:]]))


def another_ledger(work: Workdir) -> None:
    path = next(work.stage("assistant").checkpoints.glob("*400")) / "checkpoint.json"
    meta = json.loads(path.read_text())
    meta["ledger"]["digest"] = f"{1:032x}"
    write_json(path, sealed(meta))


def another_end(work: Workdir) -> None:
    path = work.stage("assistant").done
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ledger": f"{1:032x}"}))


def other_weights(work: Workdir) -> None:
    path = work.stage("assistant").student("assistant") / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-7
    save_file(tensors, path, metadata={"format": "pt"})


def another_teacher(work: Workdir) -> None:
    path = work.stage("assistant").spec
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher_digest": "0" * 64}))


def half_a_file(work: Workdir) -> None:
    (work.stage("assistant").checkpoints / ".step-000000400.1.tmp").mkdir()


def a_checkpoint_too_many(work: Workdir) -> None:
    last = next(work.stage("assistant").checkpoints.glob("*400"))
    shutil.copytree(last, last.with_name("step-000000007"))


def in_mlflow(work: Workdir, change) -> None:
    from minilm.orchestrator.tracking.client import connect

    run = json.loads((work.root / "tracking.json").read_text())["runs"]["assistant"]
    change(connect(store(work)), run)


def a_point_logged_twice(work: Workdir) -> None:
    in_mlflow(work, lambda client, run: client.log_metric(run, "assistant/loss", 0.5, timestamp=1, step=40))


def a_metric_of_nobody(work: Workdir) -> None:
    in_mlflow(work, lambda client, run: client.log_metric(run, "assistant/strange", 0.5, step=40))


def a_run_never_ended(work: Workdir) -> None:
    in_mlflow(work, lambda client, run: client.update_run(run, "RUNNING"))


@pytest.mark.parametrize(
    ("violate", "invariant", "text"),
    [
        (a_point_doubled, "metrics", "doubled [40] (1)"),
        (a_point_lost, "metrics", "heldout.jsonl: steps lost [400] (1)"),
        (a_number_lost, "metrics", "step 20 lacks ['assistant/loss']"),
        (another_ledger, "rows", "are NOT those that seed and data give"),
        (another_end, "rows", "done.json says"),
        (other_weights, "weights", "weights of assistant are"),
        (another_teacher, "teacher", "have changed"),
        (half_a_file, "tidiness", "left behind"),
        (a_checkpoint_too_many, "tidiness", "3 checkpoints instead of 2"),
        (a_point_logged_twice, "MLflow", "MLflow's assistant/loss: steps lost [] (0), doubled [40] (1)"),
        (a_metric_of_nobody, "MLflow", "no metrics file has: ['assistant/strange']"),
        (a_run_never_ended, "MLflow", "its MLflow run is RUNNING"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_every_violation_is_found(recipe, without_faults, tmp_path, violate, invariant, text):
    work = Workdir(tmp_path / "work")
    shutil.copytree(without_faults.root, work.root)
    violate(work)
    found = check_round(recipe, work, without_faults, store(work))
    assert any(text in problem for problem in found[invariant]), found


def test_progress_is_read_from_the_small_files(recipe, tmp_path):
    work = Workdir(tmp_path)
    folder = work.stage("assistant")
    folder.root.mkdir(parents=True)
    progress = Progress(recipe, work)
    log = folder.worker_log(0)
    log.write_text("x INFO stage assistant: starts\nx INFO stage assi")
    (folder.root / "reached").write_bytes(b"%20d" % 31)
    progress.update()
    assert (progress.stage, progress.step, progress.attempts, progress.resumed) == (0, 31, 1, 0)
    (folder.root / "reached").write_bytes(b"%20d" % 20)
    progress.update()
    assert (progress.step, progress.attempts) == (31, 1), (
        "the next attempt has not logged yet that it resumes"
    )
    log.write_text(log.read_text() + "stant: resumes at step 20\n")
    progress.update()
    assert (progress.step, progress.attempts, progress.resumed, progress.repeated) == (20, 2, 20, 11)
    folder.published.write_text("{}")
    progress.update()
    assert progress.stage == 1


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def comes_to(worker: subprocess.Popen[bytes], state: str) -> bool:
    """Is the process soon in this state of /proc, "" for ended?"""
    deadline = time.monotonic() + 10
    while (status(worker.pid) or [""])[0] != state:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_checkpoint_is_damaged_with_the_workers_standing_still_which_then_end(
    without_faults, worker, tmp_path, monkeypatch
):
    stage, pids = Workdir(tmp_path).stage("assistant"), []
    shutil.copytree(without_faults.stage("assistant").checkpoints, stage.checkpoints)
    names = LocalStore(stage.checkpoints).names()
    testbed = SimpleNamespace(workers=lambda: pids)
    assert Testbed.damage(testbed, stage, 0.4) is None, "nobody would read it"
    read(stage.checkpoints / names[-1])
    pids = [worker.pid]
    damage = damage_newest
    monkeypatch.setattr(
        "tests.soak.testbed.damage_newest", lambda *given: (comes_to(worker, "T") and damage(*given)) or None
    )
    assert Testbed.damage(testbed, stage, 0.4).startswith(names[-1])
    assert comes_to(worker, "")
    with pytest.raises(DAMAGE):
        read(stage.checkpoints / names[-1])


def test_the_only_sound_checkpoint_is_left_alone_and_the_workers_go_on(without_faults, worker, tmp_path):
    stage = Workdir(tmp_path).stage("assistant")
    newest = LocalStore(without_faults.stage("assistant").checkpoints).names()[-1]
    shutil.copytree(without_faults.stage("assistant").checkpoints / newest, stage.checkpoints / newest)
    assert Testbed.damage(SimpleNamespace(workers=lambda: [worker.pid]), stage, 0.4) is None
    read(stage.checkpoints / newest)
    assert comes_to(worker, "S")


def test_a_run_may_end_by_a_full_disk_though_it_had_gone_on(recipe, without_faults, tmp_path, monkeypatch):
    """A worker that is started again makes steps until its first save: the disk is full all the while."""
    now = [0.0]
    monkeypatch.setattr("tests.soak.round.time", SimpleNamespace(monotonic=lambda: now[0]))
    (tmp_path / "log").write_text("minilm: error: no space left on the disk")
    testbed = SimpleNamespace(
        log=tmp_path / "log",
        fill_disk=lambda seconds: None,
        disk_is_full=False,
        server_is_up=True,
        start_driver=lambda: None,
    )
    one_round = Round(recipe, Workdir(tmp_path), testbed, iter(()), Report(seed=0), without_faults, 60)
    assert one_round.inject(Fault(1, "full", 0.2, False, 0.4, 0.1))
    one_round.progress.attempts, one_round.progress.step = 1, 5
    one_round.check_recovery()
    assert one_round.pending is None and one_round.report.recoveries, "it went on"
    assert one_round.go_on(2) and not one_round.report.problems["ends"]
    now[0] = one_round.full_until
    assert one_round.go_on(2) and one_round.report.problems["ends"], (
        "with room again it is an end like any other"
    )


def test_the_report_fails_with_any_problem_and_computes_what_a_failure_costs():
    report = Report(seed=1)
    assert not report.passed, "nothing was run to its end"
    report.rounds, report.steps, report.useful, report.wall = 1, 1000, 10.0, 100.0
    report.problems["rows"] = []
    assert report.passed
    report.injected.update(["worker", "driver", "tracking"])
    for kind, lost, alone in (("worker", 20.0, True), ("driver", 40.0, True), ("worker", 600.0, False)):
        report.recoveries.append(Recovery(kind, lost - 1, 5, lost, alone))
    assert report.kills == 2
    assert report.expected_goodput == pytest.approx(0.95)
    text = report.text()
    assert "2 kills in 1 finished rounds of 1,000 steps" in text
    assert "at one in 10 minutes goodput would be 95.0%" in text
    report.problems["metrics"].append("round 1: a step lost")
    assert not report.passed
    assert "1 PROBLEMS\n    round 1: a step lost" in report.text()


def test_a_disk_too_small_for_the_run_itself_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(3 << 20))
    with pytest.raises(UserError, match=r"--disk-mb: given 4; allowed: at least 5, .* \(3.0 MB\)"):
        check_room(tmp_path, 4)
    check_room(tmp_path, 5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "worker,earthquake"], "--only worker,earthquake: earthquake is none of worker,driver,"),
        (["--minutes", "-1"], "--minutes: given -1; allowed: a number above 0"),
        (["--hang-seconds", "nan"], "--hang-seconds: given nan; allowed: a number above 0"),
        (["--disk-mb", "0"], "--disk-mb: given 0; allowed: a number above 0"),
        (["--workdir", "{full}"], "is not empty: give a new --workdir"),
    ],
)
def test_bad_options_are_one_line(recipe_file, tmp_path, capsys, arguments, error):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    given = ["--workdir", str(tmp_path / "new"), *arguments]
    given = [part.format(full=tmp_path / "full") for part in given]
    assert soak.main([str(recipe_file), *given]) == 2
    problem = capsys.readouterr().err
    assert error in problem
    assert problem.count("\n") == 1


@pytest.mark.parametrize(
    ("compute", "error"),
    [
        ({"gradient_sum": "fast"}, "it needs compute.gradient_sum: exact (now fast)"),
        ({"threads": "auto"}, "a number of compute.threads (now None)"),
        ({"checkpoints": "s3://bucket/folder"}, "leave compute.checkpoints out (now s3://bucket/folder)"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(tmp_path, capsys, compute, error):
    path = write_soak_recipe(tmp_path, steps=60, **compute)
    assert soak.main([str(path), "--workdir", str(tmp_path / "work")]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_a_server_away_and_a_damaged_checkpoint_leave_no_trace(
    recipe_file, recipe, without_faults, tmp_path
):
    """A real cluster, server and run, with three faults on purpose."""
    report = Report(seed=0)
    kinds = ("tracking", "worker", "damage")
    faults = iter([Fault(n, kind, 0.2, False, 0.4, 5.0) for n, kind in enumerate(kinds)])
    handler = signal.getsignal(signal.SIGTERM)
    with Testbed(tmp_path / "soak", 1, 1) as testbed:
        assert signal.getsignal(signal.SIGTERM) == handler, "Ray's would leave the server and the run behind"
        work = Workdir(testbed.disk / "work")
        testbed.prepare(recipe_file, work.root, tmp_path / "run.log", [])
        log = tmp_path / "run.log"
        assert Round(recipe, work, testbed, faults, report, without_faults, 240).run(float("inf")), (
            log.read_text()
        )
        found = check_round(recipe, work, without_faults, testbed.server_uri)
    assert report.injected == dict.fromkeys(kinds, 1)
    assert [recovery.kind for recovery in report.recoveries] == ["worker", "damage"]
    assert report.recoveries[1].repeated >= 20, "it went on from the checkpoint before the damaged one"
    assert not any(report.problems.values()), report.problems
    assert not any(found.values()), found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_minutes_of_soak(tmp_path, capsys):
    path = write_soak_recipe(tmp_path / "in", steps=600, stages=2, workers=[1, 3], by_url=True)
    code = soak.main([str(path), "--minutes", "20", "--seed", "1", "--workdir", str(tmp_path / "soak")])
    print(capsys.readouterr().out)
    assert code == 0
