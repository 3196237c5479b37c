"""A stage that ends when it is good enough: when that is, and that kills, workers and a lost work directory change
nothing."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from minilm.model.export import weights_digest
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import ProbeSpec, StageSpec, UntilSpec
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.worker.loop import run_stage
from minilm.orchestrator.worker.until import met_at, num_steps
from tests import worker_pool
from tests.support import NO_DATA, change, checkpoints_in, make_spec

ANY = Path()


def point(value: float, share: float = 0.0, name: str = "small") -> dict[str, float]:
    return {f"{name}/heldout/probe/knn": value, f"{name}/heldout/probe/knn/share-of-teacher": share}


def spec_of(until: UntilSpec, **changes: object) -> StageSpec:
    values = {"steps": 100, "warmup_steps": 20, "schedule": "wsd", "decay_steps": 30}
    return make_spec(NO_DATA, ANY, ANY, until=until, **values | changes)


def test_a_share_is_met_at_the_first_measurement_after_the_warm_up_that_has_it():
    spec = spec_of(UntilSpec("knn", 10, share_of_teacher=0.9))
    points = {10: point(1.0, 0.95), 30: point(0.8, 0.89), 40: point(0.9, 0.9), 50: point(0.1, 0.1)}
    assert met_at(spec, points) == 40 and num_steps(spec, points) == 70
    assert met_at(spec, {s: points[s] for s in (10, 30)}) is None
    assert num_steps(spec, {s: points[s] for s in (10, 30)}) == 100
    assert num_steps(spec, {80: point(0.9, 1.0)}) == 100  # the decay had begun at 70 already
    assert num_steps(spec_of(spec.until, schedule="constant", decay_steps=None), points) == 40


def test_a_plateau_is_so_many_measurements_without_a_gain():
    spec = spec_of(UntilSpec("knn", 10, patience=2, min_gain=0.1))
    points = {20: point(0.50), 30: point(0.54), 40: point(0.56), 50: point(0.60), 60: point(0.61)}
    assert met_at(spec, points) == 60  # 0.56 is a gain of more than a tenth over 0.50; 0.60 and 0.61 are none
    assert met_at(spec, points | {50: point(0.7)}) is None
    assert met_at(spec, points | {50: point(float("nan"))}) == 60  # no number is no gain
    divergence = spec_of(UntilSpec("divergence", 10, patience=1, min_gain=0.0))
    falling = {step: {"small/heldout/a": 1 / step, "small/heldout/a/corpus-1": 9.0} for step in (20, 30, 40)}
    assert met_at(divergence, falling) is None
    assert (
        met_at(divergence, falling | {50: {"small/heldout/a": 0.03}}) == 50
    )  # lower is better, and this is not


def test_every_student_has_to_be_good_enough():
    students = (("small", 2, 24), ("tiny", 1, 24))
    until = UntilSpec("knn", 10, share_of_teacher=0.9, patience=2)
    spec = spec_of(until, students=students)
    points = {
        step: point(0.5, share) | point(value, 0.1, "tiny")
        for step, share, value in ((20, 0.9, 0.1), (30, 0.9, 0.2), (40, 0.9, 0.2), (50, 0.9, 0.2))
    }
    assert met_at(spec, points) == 50  # tiny has no gain at 40 and 50, and so either way is enough


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards, teacher) -> StageSpec:
    """A stage that was good enough at step 12 of at most 40 and ended at step 18."""
    spec = make_spec(
        shards,
        teacher,
        tmp_path_factory.mktemp("whole"),
        steps=40,
        schedule="wsd",
        decay_steps=6,
        log_every=5,
        checkpoint_every_steps=1,
        keep_checkpoints=40,
        trunk="trunk",
        evaluate=(ProbeSpec("knn", 4),),
        until=UntilSpec("knn", 4, patience=2, min_gain=1.0),
    )
    assert run_stage(spec)
    return spec


def found(spec: StageSpec) -> tuple[str, int, list, list]:
    folder = StageFolder(Path(spec.folder))
    logs = [
        [(p.step, p.metrics["learning_rate"]) for p in read_all_metrics(folder.step_metrics)],
        [(p.step, p.metrics) for p in read_all_metrics(folder.heldout_metrics)],
    ]
    return weights_digest(folder.student("small")), read_json(folder.done)["steps"], *logs


def test_the_decay_begins_where_the_condition_is_met_and_ends_the_stage(whole):
    _, steps, logged, heldout = found(whole)
    assert steps == 18
    assert [step for step, _ in heldout] == [0, 4, 8, 12, 16, 18]
    assert {"small/heldout/value", "small/heldout/probe/knn"} < heldout[-1][1].keys()
    peak = whole.learning_rate.peak_lr
    rates = dict(logged)
    assert list(rates) == [4, 5, 8, 10, 12, 15, 16, 18]
    assert rates[12] == peak and rates[15] == pytest.approx(peak * 4 / 6)
    assert rates[18] == pytest.approx(peak / 6)
    assert "18 of 8 rows" in (StageFolder(Path(whole.folder)).student("small") / "README.md").read_text()


def test_killed_before_and_after_on_two_workers_and_one_it_ends_the_same(whole, tmp_path):
    killed = replace(whole, folder=str(tmp_path))
    for size, step in ((2, 6), (1, 14)):
        codes = worker_pool.join(worker_pool.start(killed, size, dies_after=step, only=0))
        assert codes[0] == -signal.SIGKILL, worker_pool.log(killed)
    assert run_stage(killed)
    assert found(killed) == found(whole)


@pytest.mark.parametrize("last", [10, 13])
def test_a_new_work_directory_goes_on_with_the_checkpoints_points(whole, tmp_path, last):
    """Before the condition is met, and after: the points lie in another work directory."""
    spec = replace(whole, folder=str(tmp_path))
    checkpoints = StageFolder(tmp_path).checkpoints
    for folder in checkpoints_in(StageFolder(Path(whole.folder)).checkpoints)[:last]:
        shutil.copytree(folder, checkpoints / folder.name)
    assert run_stage(spec)
    assert found(spec)[:2] == found(whole)[:2]


def test_where_a_step_was_measured_before_the_log_decides(whole, tmp_path):
    """Whatever an older attempt has logged, on a machine that computes otherwise, say, is what was decided from."""
    spec = replace(whole, folder=str(tmp_path))
    folder = StageFolder(tmp_path)
    shutil.copytree(StageFolder(Path(whole.folder)).checkpoints, folder.checkpoints)
    for checkpoint in checkpoints_in(folder.checkpoints)[10:]:
        shutil.rmtree(checkpoint)
    log = StageFolder(Path(whole.folder)).heldout_metrics.read_text().splitlines(keepends=True)
    folder.heldout_metrics.write_text("".join(log[:2]) + log[2].replace('probe/knn":', 'probe/knn":9'))
    assert run_stage(spec)
    assert found(spec)[1] == 22  # the gain at step 8 put the plateau off by one measurement


def test_a_decay_branches_from_any_checkpoint_before_one_to_the_bits_of_a_run_from_step_zero(whole, tmp_path):
    plain = change(replace(whole, until=None, evaluate=(), digest="another"), decay_steps=4)
    scratch, branch, late = (
        replace(plain, folder=str(tmp_path / name), steps=steps)
        for name, steps in (("scratch", 14), ("branch", 14), ("late", 30))
    )
    assert run_stage(scratch)
    checkpoints = checkpoints_in(StageFolder(Path(whole.folder)).checkpoints)
    for spec, step in ((branch, 10), (late, 13)):
        source = checkpoints[step - 1]
        shutil.copytree(source, StageFolder(Path(spec.folder)).checkpoints / source.name)
    seen: list[int] = []
    assert run_stage(branch, on_step=seen.append)
    assert seen == [11, 12, 13, 14] and found(branch)[:2] == found(scratch)[:2]
    with pytest.raises(UserError, match="belongs to another recipe"):  # made in the decay of `whole`
        run_stage(late)
    with pytest.raises(UserError, match="belongs to another recipe"):  # whose own decay would have begun
        run_stage(change(replace(branch, digest="a third", steps=18), decay_steps=5))
