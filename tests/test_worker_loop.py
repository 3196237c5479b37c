"""The loop without any launcher: resuming, several students, several workers, errors. Real processes, real kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForMaskedLM

from minilm.data.stream import Stream
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import load_encoder
from minilm.model.errors import ModelError
from minilm.model.export import weights_digest
from minilm.model.loss.objective import Objective
from minilm.orchestrator.checkpoint.format import read
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Superseded
from minilm.orchestrator.worker.__main__ import main
from minilm.orchestrator.worker.error_file import run_reporting
from minilm.orchestrator.worker.errors import Evicted
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.ports import free_port
from tests.support import change, checkpoints_in, make_spec

CLOCK = ("rows_per_second", "tokens_per_second", "input_wait_share", "data/rows_read", "data/bytes_read")


def digest(spec: StageSpec, name: str = "small") -> str:
    return weights_digest(StageFolder(Path(spec.folder)).student(name))


def start_worker(spec: StageSpec, **environment: str) -> subprocess.Popen[str]:
    path = Path(spec.folder) / "stage.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(spec.to_json())
    return subprocess.Popen(
        [sys.executable, "-m", "minilm.orchestrator.worker", str(path)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("data", ["shards", "masked"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(request, data, teacher, tmp_path):
    whole = make_spec(request.getfixturevalue(data), teacher, tmp_path / "whole", eval_every=6)
    assert run_stage(whole)
    parts = replace(whole, folder=str(tmp_path / "parts"))
    folder = StageFolder(Path(parts.folder))

    def stop_after_four(step: int) -> None:
        if step == 4:
            folder.stop_request.touch()
            time.sleep(0.6)  # the loop looks for the request twice a second

    assert not run_stage(parts, on_step=stop_after_four)
    assert not folder.done.exists()
    assert checkpoints_in(folder.checkpoints)[-1].name == "step-000000005"
    folder.stop_request.unlink()
    seen: list[int] = []
    assert run_stage(parts, on_step=seen.append)
    assert seen == list(range(6, 13))
    assert digest(parts) == digest(whole)
    for file in ("step_metrics", "heldout_metrics"):
        ours, theirs = (
            [(p.step, {k: v for k, v in p.metrics.items() if k not in CLOCK}) for p in read_all_metrics(path)]
            for path in (getattr(folder, file), getattr(StageFolder(Path(whole.folder)), file))
        )
        assert ours == theirs


def test_killed_at_random_moments_the_run_ends_with_the_same_weights(shards, teacher, tmp_path):
    """SIGKILL in the middle of a stage, five times in a row."""
    seed = random.randrange(1000)
    print(f"seed {seed}")  # shown when it fails
    whole = make_spec(shards, teacher, tmp_path / "whole", steps=60)
    assert run_stage(whole)
    spec = replace(whole, folder=str(tmp_path / "killed"))
    folder = StageFolder(Path(spec.folder))
    for target in sorted(random.Random(seed).sample(range(1, 56), 5)):
        assert worker_pool.kill_at(spec, 1, rank=0, step=target) == [-signal.SIGKILL], worker_pool.log(spec)
        assert not folder.done.exists()
    assert worker_pool.join(worker_pool.start(spec, 1)) == [0], worker_pool.log(spec)
    assert digest(spec) == digest(whole)
    assert [p.step for p in read_all_metrics(folder.step_metrics)] == list(range(2, 61, 2))


def test_killed_between_the_last_checkpoint_and_the_export(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path)
    assert run_stage(spec)
    before = digest(spec)
    folder = StageFolder(tmp_path)
    folder.done.unlink()
    (folder.student("small") / "model.safetensors").unlink()
    assert run_stage(spec, on_step=lambda step: pytest.fail("nothing is left to train"))
    assert digest(spec) == before


def test_two_students_get_the_weights_that_each_gets_alone(shards, teacher, tmp_path):
    sizes = (("small", 2, 24), ("tiny", 1, 16))
    both = make_spec(shards, teacher, tmp_path / "both", students=sizes)
    assert run_stage(both)
    for size in sizes:
        alone = make_spec(shards, teacher, tmp_path / size[0], students=(size,))
        assert run_stage(alone)
        assert digest(alone, size[0]) == digest(both, size[0])


def test_held_out_divergence_falls(shards, teacher, tmp_path):
    spec = make_spec(
        shards,
        teacher,
        tmp_path,
        teacher_layer=1,
        students=(("small", 1, 48),),
        steps=100,
        peak_lr=1e-2,
        dropout=0.0,
    )
    assert run_stage(spec)
    points = read_all_metrics(StageFolder(tmp_path).heldout_metrics)
    assert [p.step for p in points] == [0, 100]
    assert sum(points[1].metrics.values()) < 0.45 * sum(points[0].metrics.values())
    assert set(points[0].metrics) == {"small/heldout/attention", "small/heldout/value"}


def test_values_by_head_are_logged_and_change_no_bit(shards, teacher, tmp_path):
    plain = make_spec(shards, teacher, tmp_path / "plain", steps=5)
    spec = change(replace(plain, folder=str(tmp_path / "heads")), per_head=True)
    both = replace(spec, folder=str(tmp_path / "both"))
    assert run_stage(plain) and run_stage(spec)
    assert worker_pool.join(worker_pool.start(both, 2)) == [0, 0], worker_pool.log(both)
    assert digest(spec) == digest(plain)
    points, shared, without = (
        read_all_metrics(StageFolder(Path(j.folder)).step_metrics) for j in (spec, both, plain)
    )
    assert [point.step for point in points] == [2, 4, 5]
    assert not any("head" in name for point in without for name in point.metrics)
    for point, other in zip(points, shared, strict=True):
        for term in ("attention", "value"):
            heads = [point.metrics[f"small/{term}/head-{head:02d}"] for head in (1, 2, 3, 4)]
            assert sum(heads) / 4 == pytest.approx(point.metrics[f"small/{term}"], rel=1e-5)
            assert heads == [other.metrics[f"small/{term}/head-{head:02d}"] for head in (1, 2, 3, 4)]
            assert len(set(heads)) == 4
        assert other.metrics["data/rows_read"] >= 8 * point.step
        assert other.metrics["data/bytes_read"] == 2 * 32 * other.metrics["data/rows_read"]


def test_soft_labels_train_a_student_with_a_head(shards, teacher, tmp_path):
    config = BertConfig.from_pretrained(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    soft = {"name": "soft-label-mlm", "reduction": "sequence", "relation_heads": None}
    spec = make_spec(
        shards, tmp_path / "teacher", tmp_path / "stage", objective=soft, steps=60, peak_lr=1e-2, dropout=0.0
    )
    assert run_stage(spec)
    folder = StageFolder(Path(spec.folder))
    points = read_all_metrics(folder.heldout_metrics)
    before, after = (point.metrics["small/heldout/soft_labels"] for point in points)
    assert after < 0.9 * before
    load_encoder(folder.student("small"), head=True)  # raises where the head's weights are not in it
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a bert encoder with its head \(cls\..*$"):
        run_stage(replace(spec, teacher=str(teacher), folder=str(tmp_path / "headless")))


@pytest.mark.parametrize(
    "name", ["minilmv2", "attention-only", "value-mse", "layer-to-layer", "hidden-relation"]
)
def test_every_objective_is_logged_alike(shards, teacher, tmp_path, name):
    spec = make_spec(shards, teacher, tmp_path, objective={"name": name}, steps=2, log_every=1)
    assert run_stage(spec)
    folder = StageFolder(tmp_path)
    terms = Objective.named(name).names
    for point in read_all_metrics(folder.step_metrics):
        values = [point.metrics[f"small/{term}"] for term in terms]
        assert point.metrics["small/loss"] == pytest.approx(sum(values)) and min(values) > 0
    for point in read_all_metrics(folder.heldout_metrics):
        assert {f"small/heldout/{term}" for term in terms} <= point.metrics.keys()


def test_rows_of_a_step_are_the_same_for_every_worker_count(shards):
    from minilm.data.stream import partition

    stream = Stream(shards, seed=3, batch=12, micro_batch=2)
    for step in (0, 5):
        alone = [stream.row_ids(step, i).tolist() for i in range(6)]
        for workers in (2, 3, 4, 5):
            joined = [
                stream.row_ids(step, i).tolist() for r in range(workers) for i in partition(6, r, workers)
            ]
            assert joined == alone


def test_a_worker_of_an_older_driver_writes_nothing(shards, teacher, tmp_path):
    """Not when it starts, though a save of the new driver is in flight, and not when it loses the lease on its way."""
    lease = tmp_path / "lease" / "000004.json"
    lease.parent.mkdir()
    lease.touch()
    spec = make_spec(
        shards, teacher, tmp_path / "stages" / "first", lease=str(lease), steps=2000, log_every=2000
    )
    folder = StageFolder(Path(spec.folder))

    def lose(step):
        if step == 4:
            lease.rename(lease.with_name("000005.json"))  # as good as taken

    with pytest.raises(Superseded, match=f"another run has taken {tmp_path} over"):
        run_stage(change(spec, checkpoint_every_steps=5), lose)
    assert checkpoints_in(folder.checkpoints) == []
    with pytest.raises(Superseded):  # no save is due: the next sign of life is refused, within about a second
        lease.touch()
        run_stage(
            change(spec, checkpoint_every_steps=None), lambda step: lease.unlink() if step == 9 else None
        )
    assert json.loads(folder.heartbeat.read_text())["step"] < 1000
    in_flight = folder.checkpoints / ".step-000000005.99.tmp"
    in_flight.mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")}
    assert not run_reporting(spec)
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")} == before


def test_an_announced_eviction_saves_the_step_that_is_done_and_no_more(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, checkpoint_every_steps=None)
    done: list[int] = []
    with pytest.raises(Evicted, match="step 6 is saved"):
        run_reporting(spec, done.append, lambda: len(done) >= 5)
    assert [path.name for path in checkpoints_in(StageFolder(tmp_path).checkpoints)] == ["step-000000006"]
    assert json.loads((tmp_path / "attempts.json").read_text())["running"] is False  # it counts as no death
    assert run_reporting(spec, done.append, lambda: len(done) >= 12)  # at the last step it is no matter
    assert done == list(range(1, 13))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(shards, teacher, tmp_path):
    spec = make_spec(
        shards, teacher, tmp_path, batch=12, peak_lr=1e30, warmup_steps=0, checkpoint_every_steps=None
    )
    with pytest.raises(
        UserError,
        match=r"small is not finite at step 1, of rows \d+(, \d+){7}, … \(12 rows, all in .*failed-step.json\); "
        r"no weight has moved by it; lower peak_lr \(now 1e\+30\)",
    ):
        run_stage(spec)
    assert checkpoints_in(StageFolder(tmp_path).checkpoints) == []
    stream = Stream(shards, seed=spec.seed, batch=12, micro_batch=12)
    failed = json.loads(StageFolder(tmp_path).failed_step.read_text())
    assert failed == {"step": 1, "row_ids": stream.row_ids(1, 0).tolist()}


def test_a_teacher_whose_output_is_not_finite_is_named_and_no_learning_rate_is(shards, teacher, tmp_path):
    """Its weights are finite, and their products are not."""
    model = AutoModel.from_pretrained(teacher)
    model.encoder.layer[2].attention.self.query.weight.data.fill_(3e38)
    shutil.copytree(teacher, tmp_path / "huge")
    model.save_pretrained(tmp_path / "huge")
    spec = make_spec(shards, tmp_path / "huge", tmp_path / "stage")
    Path(spec.folder).mkdir()
    with pytest.raises(
        UserError,
        match=r"^stage first: the output of the teacher bert is not finite, first in row \d+ of step 0; no learning "
        r"rate mends that: give another teacher$",
    ):
        run_stage(spec)


def test_steps_that_are_not_finite_are_skipped_counted_and_bounded(shards, teacher, tmp_path, monkeypatch):
    """Micro-batches with a certain row have a loss of NaN: their steps leave no trace but a count."""
    spec = make_spec(
        shards, teacher, tmp_path, on_nonfinite="skip", max_skipped_steps=2, steps=9, log_every=1
    )
    stream = Stream(shards, seed=spec.seed, batch=8, micro_batch=8)
    poison_ids = stream.micro_batch(4, 0).input_ids[:1]
    original = Distiller.term_sums

    def term_sums(self, name, taught, ids, mask, **rest):
        sums = original(self, name, taught, ids, mask, **rest)
        bad = bool((ids == poison_ids).all(1).any())
        return sums * float("nan") if bad else sums

    monkeypatch.setattr(Distiller, "term_sums", term_sums)
    assert run_stage(spec)
    points = read_all_metrics(StageFolder(tmp_path).step_metrics)
    assert [p.metrics["small/skipped_steps"] for p in points] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    meta, tensors = read(checkpoints_in(StageFolder(tmp_path).checkpoints)[-1])
    assert tensors["small.optimizer.safetensors"]["refused"].tolist() == [1, 4, 0]
    with pytest.raises(UserError, match=r"not finite at step 4, and 1 updates were skipped .*steps is 0\)"):
        run_stage(change(replace(spec, folder=str(tmp_path / "none")), max_skipped_steps=0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none_is_refused(shards, teacher, tmp_path):
    with pytest.raises(UserError, match="compute.device is cuda, but this machine has no usable CUDA device"):
        run_stage(make_spec(shards, teacher, tmp_path, device="cuda"))


def test_another_jobs_checkpoint_is_refused(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path)
    assert run_stage(spec)
    with pytest.raises(UserError, match="belongs to another recipe"):
        run_stage(replace(spec, digest="other"))


def test_a_rank_says_that_rank_zero_failed_to_resume(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path)
    assert run_stage(spec)
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    other = replace(spec, digest="other")
    processes = [start_worker(other, RANK=str(rank), LOCAL_RANK=str(rank), **together) for rank in (0, 1)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "belongs to another recipe" in errors[0]
    assert errors[1] == "minilm: stopped: rank 0 failed to resume; see worker-0.log\n"


def test_the_plain_command_does_not_heed_an_old_request_to_stop(shards, teacher, tmp_path, monkeypatch):
    spec = make_spec(shards, teacher, tmp_path)
    StageFolder(tmp_path).stop_request.touch()
    (tmp_path / "stage.json").write_text(spec.to_json())
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "stage.json")])
    assert main() == 0
    assert StageFolder(tmp_path).done.exists()


def test_the_plain_command_reports_errors_in_one_line(shards, teacher, tmp_path):
    gone = shutil.copytree(shards, tmp_path / "data")
    spec = make_spec(gone, teacher, tmp_path / "stage")
    shutil.rmtree(gone)
    process = start_worker(spec)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert errors.startswith("minilm: error:")
    assert errors.count("\n") == 1
