"""MLflow runs on a real SQLite store and a real server: resumed, away, back; nothing lost or doubled."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.metrics_file import MetricsFile
from minilm.orchestrator.system.versions import flatten, git_commit, package_tags, versions
from minilm.orchestrator.tracking.calls import patiently
from minilm.orchestrator.tracking.client import connect, tracking_uri
from minilm.orchestrator.tracking.outbox import Metric
from minilm.orchestrator.tracking.pending import has_pending
from minilm.orchestrator.tracking.tracking import Tracking, flush_pending
from tests.mlflow_server import server
from tests.ports import free_port

RECIPE = {
    "name": "tiny",
    "seed": 0,
    "data": {"text": ["a.txt", "b.txt"]},
    "stages": [{"name": "small", "batch": 8, "adam_betas": [0.9, 0.98]}, {"name": "smaller", "batch": 16}],
}


@pytest.fixture
def workdir(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "work dir"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    return folder


def open_tracking(workdir: Path, **changes: Any) -> Tracking:
    arguments: dict[str, Any] = {"name": "tiny", "params": RECIPE, "tags": {"minilm.recipe_digest": "abc"}}
    return Tracking.open(workdir, "experiment", **(arguments | changes))


def history(tracking: Tracking, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracking.client.get_metric_history(run_id, key)]


def test_a_recipe_is_flattened_by_names() -> None:
    assert flatten(RECIPE) == {
        "name": "tiny",
        "seed": "0",
        "data.text": '["a.txt", "b.txt"]',
        "stages.small.batch": "8",
        "stages.small.adam_betas": "[0.9, 0.98]",
        "stages.smaller.batch": "16",
    }


def test_the_commit_is_that_of_this_checkout_only(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == commit + "+changes"
    (tmp_path / "below").mkdir()
    assert git_commit(tmp_path / "below") is None


def test_versions_name_what_computes() -> None:
    tags = package_tags()
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"version.torch", "version.transformers", "version.ray", "version.mlflow"} <= tags.keys()
    assert versions(["torch", "a-package-that-is-not-installed"]).keys() == {"torch"}


def test_switches_are_set_before_mlflow_is_used() -> None:
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    from mlflow.telemetry import get_telemetry_client
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
    assert get_telemetry_client() is None


def test_a_run_holds_everything_and_a_resumed_one_goes_on_in_it(workdir: Path) -> None:
    recipe_file = workdir / "tiny.yaml"
    recipe_file.write_text("name: tiny\n")
    many = {f"key{i}": i for i in range(250)} | {"long": "x" * 9000}
    tracking = open_tracking(workdir, params=RECIPE | many, recipe_file=recipe_file)
    stage = tracking.stage("small", {"batch": 8})
    uploader = stage.follow([workdir / "metrics.jsonl", workdir / "heldout.jsonl"])
    with MetricsFile(workdir / "metrics.jsonl") as log, MetricsFile(workdir / "heldout.jsonl") as heldout:
        for step in range(5):
            log.append(step, {"small/loss": 1 / (step + 1), "learning_rate": 1e-3})
        heldout.append(4, {"small/heldout/attention": 0.5})
    tracking.tag({"minilm.data_fingerprint": "f00d"})
    assert uploader.close(20) == 0
    # the driver dies here; a new one is started with another worker count
    again = open_tracking(workdir, params=RECIPE | many | {"seed": 1}, recipe_file=recipe_file)
    stage_again = again.stage("small", {"batch": 8})
    assert (again.run_id, stage_again.run_id) == (tracking.run_id, stage.run_id)
    stage_again.follow([workdir / "metrics.jsonl", workdir / "heldout.jsonl"])
    with MetricsFile(workdir / "metrics.jsonl") as log:
        for step in range(2, 8):
            log.append(step, {"small/loss": 1 / (step + 1), "learning_rate": 1e-3})
    picture = workdir / "maps.png"
    picture.write_bytes(b"png")
    stage_again.artifact(picture, "pictures")
    assert stage_again.finish() == 0
    assert again.finish() == 0

    parent, child = again.client.get_run(again.run_id), again.client.get_run(stage.run_id)
    assert len(parent.data.params) == len(flatten(RECIPE)) + 251
    assert parent.data.params["long"] == "x" * 6000
    assert parent.data.params["stages.small.adam_betas"] == "[0.9, 0.98]"
    assert parent.data.params["seed"] == "0" and parent.data.tags["changed.seed"] == "1"
    assert parent.data.tags["minilm.recipe_digest"] == "abc"
    assert parent.data.tags["minilm.data_fingerprint"] == "f00d"
    assert parent.data.tags["version.torch"] == package_tags()["version.torch"]
    assert parent.info.run_name == "tiny" and parent.info.status == "FINISHED" and parent.info.end_time
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == "small" and child.info.status == "FINISHED"
    assert history(again, stage.run_id, "small/loss") == [(step, 1 / (step + 1)) for step in range(8)]
    assert history(again, stage.run_id, "small/heldout/attention") == [(4, 0.5)]
    assert (workdir / "mlartifacts" / parent.info.run_id / "artifacts" / "recipe" / "tiny.yaml").exists()
    assert (workdir / "mlartifacts" / child.info.run_id / "artifacts" / "pictures" / "maps.png").exists()
    assert len(again.client.search_runs([parent.info.experiment_id])) == 2
    assert again.look == f"mlflow ui --backend-store-uri 'sqlite:///{workdir}/mlflow.db'"


def test_the_recipes_run_has_what_its_stages_came_to_and_what_they_read(workdir: Path) -> None:
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {})
    read = [("wiki", "ab" * 32, "s3://bucket/wiki", {"seq_len": 32, "weight": 0.5})]
    for _ in range(2):  # a resumed run
        tracking.datasets(read)
        tracking.datasets(read, "small")
    tracking.metrics({"small/heldout/attention": 0.25, "small/heldout_sum": 0.5}, step=40)
    assert tracking.finish() == 0
    parent = tracking.client.get_run(tracking.run_id)
    assert parent.data.metrics == {"small/heldout/attention": 0.25, "small/heldout_sum": 0.5}
    assert history(tracking, tracking.run_id, "small/heldout_sum") == [(40, 0.5)]
    for run_id in (tracking.run_id, stage.run_id):
        (found,) = tracking.client.get_run(run_id).inputs.dataset_inputs
        assert (found.dataset.name, found.dataset.digest) == ("wiki", "ab" * 18)
        assert json.loads(found.dataset.source) == {"uri": "s3://bucket/wiki"}
        assert json.loads(found.dataset.profile) == {"seq_len": 32, "weight": 0.5}
        assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_a_driver_that_dies_before_it_saves_the_id_finds_the_run_again(workdir: Path) -> None:
    tracking = open_tracking(workdir)
    run_id = tracking.run_id
    state = json.loads((workdir / "tracking.json").read_text())
    (workdir / "tracking.json").write_text(json.dumps(state | {"runs": {}}))
    assert open_tracking(workdir).run_id == run_id


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_is_told(workdir: Path, status: str) -> None:
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {})
    stage.finish(status)
    tracking.finish(status)
    assert tracking.client.get_run(stage.run_id).info.status == status
    assert tracking.client.get_run(tracking.run_id).info.status == status
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        tracking.finish("DONE")
    assert open_tracking(workdir).client.get_run(tracking.run_id).info.status == "RUNNING"


def test_the_same_batch_twice_is_one_batch(workdir: Path) -> None:
    """What the uploader's "at least once" rests on: key, time, step and value again change nothing."""
    tracking = open_tracking(workdir)
    values = [0.25, math.nan, math.inf, -math.inf]
    batch = [Metric(f"m{i}", value, 1_700_000_000_000 + i, i) for i, value in enumerate(values)]
    tracking.client.log_batch(tracking.run_id, metrics=batch)
    tracking.client.log_batch(tracking.run_id, metrics=[*batch, Metric("m9", 9.0, 1, 9)])
    for i, value in enumerate(values):
        ((step, stored),) = history(tracking, tracking.run_id, f"m{i}")
        assert step == i
        # SQL has no infinity: MLflow stores the largest double for it, and NaN as NaN
        expected = math.copysign(sys.float_info.max, value) if math.isinf(value) else value
        assert stored == expected or (math.isnan(stored) and math.isnan(expected))
    assert history(tracking, tracking.run_id, "m9") == [(9, 9.0)]


def test_a_state_that_was_not_saved_doubles_no_point(workdir: Path) -> None:
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {})
    with MetricsFile(workdir / "m.jsonl") as log:
        for step in range(1500):
            log.append(step, {"small/loss": step, "small/value": step})
    assert stage.follow([workdir / "m.jsonl"]).close(60) == 0
    (sent,) = workdir.glob("uploaded-*.json")
    sent.unlink()
    again = stage.follow([workdir / "m.jsonl"])
    assert again.close(60) == 0
    assert again.num_sent == 1500
    assert history(tracking, stage.run_id, "small/loss") == [(step, step) for step in range(1500)]


def test_a_new_run_without_its_server_is_refused_in_one_line(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(
        UserError, match="does not answer .*: start it, or unset MLFLOW_TRACKING_URI"
    ) as error:
        open_tracking(workdir)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 10


def test_a_password_in_the_address_is_never_said(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"127.0.0.1:{free_port()}"
    open_tracking(workdir)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@{address}")
    tracking = open_tracking(workdir)  # resumed with its server away: a warning
    assert f"MLflow at http://{address} could not be told" in caplog.text
    assert tracking.look.startswith(f"http://{address}/#/")
    with pytest.raises(UserError, match=f"MLflow at http://{address} does not answer") as error:
        patiently(tracking.uri, lambda: tracking.client.get_run(tracking.run_id), 0.0)
    assert "s3cret" not in caplog.text + str(error.value)
    assert "s3cret" not in (workdir / "tracking.json").read_text()
    tracking.uri = "postgresql://user:s3cret@host/db"
    assert tracking.look == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'


def test_a_deleted_experiment_is_named(workdir: Path) -> None:
    client = connect(tracking_uri(workdir))
    client.delete_experiment(client.create_experiment("experiment"))
    with pytest.raises(
        UserError, match="experiment 'experiment' was deleted .* --set tracking.experiment=NAME"
    ):
        open_tracking(workdir)


def test_a_run_goes_on_while_mlflow_is_away_and_tells_it_later(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_tracking(workdir)
    store = workdir / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracking = open_tracking(workdir)  # resumed with its server away: no error
    stage = tracking.stage("small", {"batch": 8})
    stage.follow([workdir / "m.jsonl"])
    with MetricsFile(workdir / "m.jsonl") as log:
        for step in range(3):
            log.append(step, {"small/loss": step})
    (workdir / "p.png").write_bytes(b"png")
    stage.artifact(workdir / "p.png")
    assert stage.finish(timeout_seconds=0.5) > 0
    assert tracking.finish() > 0
    warnings = [
        record.getMessage() for record in caplog.records if record.name.startswith("minilm.orchestrator")
    ]
    assert len([text for text in warnings if "could not be told" in text]) == 1
    assert len([text for text in warnings if "points could not be sent to" in text]) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    back = open_tracking(workdir)
    assert back.run_id == first.run_id
    run_id = back.stage("small", {"batch": 8}).run_id
    assert history(back, run_id, "small/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert [file.path for file in back.client.list_artifacts(run_id)] == ["p.png"]
    assert back.finish() == 0
    assert json.loads((workdir / "tracking.json").read_text())["notes"] == []


def test_a_finished_run_tells_the_rest_when_it_is_asked_again(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_pending(workdir) and flush_pending(workdir, "experiment") == 0
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {"batch": 8})
    stage.follow([workdir / "m.jsonl"])
    assert not has_pending(workdir)
    with MetricsFile(workdir / "m.jsonl") as log:
        log.append(1, {"small/loss": 1})
    with monkeypatch.context() as patch:
        for call in ("log_batch", "get_run", "search_runs"):
            patch.setattr(tracking.client, call, lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
        stage.finish(timeout_seconds=0.1)
        left = tracking.finish()
    assert left > 0 and has_pending(workdir)

    other = workdir / "other.db"
    with monkeypatch.context() as patch:  # neither a server that is away nor another one takes them
        patch.setenv("MLFLOW_TRACKING_URI", f"http://u:s3cret@127.0.0.1:{free_port()}")
        assert flush_pending(workdir, "experiment") == left
        assert "could not be told" in caplog.text and "s3cret" not in caplog.text
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
        assert flush_pending(workdir, "experiment") == left
        assert not other.exists()
        connect(f"sqlite:///{other}").search_experiments()
        assert flush_pending(workdir, "experiment") == left
        assert caplog.text.count("set MLFLOW_TRACKING_URI as it was for the run") == 2
    assert flush_pending(workdir, "experiment") == 0
    assert not has_pending(workdir)
    assert history(tracking, stage.run_id, "small/loss") == [(1, 1.0)]
    for run_id in (stage.run_id, tracking.run_id):
        assert tracking.client.get_run(run_id).info.status == "FINISHED"
    assert len(tracking.client.search_runs([tracking.client.get_run(stage.run_id).info.experiment_id])) == 2
    assert flush_pending(workdir, "experiment") == 0
    (workdir / "tracking.json").write_text("{")
    assert not has_pending(workdir)


def test_another_server_gets_runs_of_its_own_and_every_point(
    workdir: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_tracking(workdir)
    with MetricsFile(workdir / "m.jsonl") as log:
        log.append(1, {"small/loss": 1})
        first.stage("small", {}).follow([workdir / "m.jsonl"]).close(20)
        log.append(2, {"small/loss": 2})
    other = workdir / "other.db"
    other.write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    second = open_tracking(workdir)
    assert second.run_id != first.run_id
    assert "a new one is made there" in caplog.text
    stage = second.stage("small", {})
    stage.follow([workdir / "m.jsonl"]).close(20)
    assert history(second, stage.run_id, "small/loss") == [(1, 1.0), (2, 2.0)]


def test_a_stage_whose_run_was_deleted_gets_a_new_one_with_every_point(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {"batch": 8})
    with MetricsFile(workdir / "m.jsonl") as log:
        log.append(1, {"small/loss": 1})
        stage.follow([workdir / "m.jsonl"]).close(20)
        first = stage.run_id
        tracking.client.delete_run(first)  # between two runs
        again = open_tracking(workdir)
        assert again.run_id == tracking.run_id
        assert f"run {first} of" in caplog.text and "a new one is made there" in caplog.text
        stage = again.stage("small", {"batch": 8})
        log.append(2, {"small/loss": 2})
        stage.follow([workdir / "m.jsonl"]).close(20)
        second = stage.run_id
        assert history(again, second, "small/loss") == [(1, 1.0), (2, 2.0)]
        assert again.client.get_run(second).data.params == {"batch": "8"}

        stage.follow([workdir / "m.jsonl"])
        again.client.delete_run(second)  # in the middle of one
        log.append(3, {"small/loss": 3})
        stage.tag({"said": "afterwards"})
        assert stage.finish(timeout_seconds=20) == 0 and again.finish() == 0
    third = again.client.get_run(stage.run_id)
    assert len({first, second, third.info.run_id}) == 3
    assert third.data.tags["said"] == "afterwards" and third.info.status == "FINISHED"
    assert history(again, third.info.run_id, "small/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_stage_trained_again_from_nothing_gets_a_run_of_its_own(workdir: Path) -> None:
    def train(folder: Path, losses: list[float]) -> tuple[Tracking, str]:
        tracking = open_tracking(folder)
        stage = tracking.stage("small", {"batch": 8})
        stage.follow([folder / "stages" / "small" / "m.jsonl", folder / "stages" / "small" / "h.jsonl"])
        with MetricsFile(folder / "stages" / "small" / "m.jsonl") as log:
            for step, loss in enumerate(losses):
                log.append(step, {"small/loss": loss})
        assert stage.finish() == 0 and tracking.finish() == 0
        return tracking, stage.run_id

    _, first = train(workdir, [3.0, 2.0])
    moved = workdir.rename(workdir.with_name("moved"))  # the folder has another path, and the stage goes on
    tracking, same = train(moved, [3.0, 2.0, 1.0])
    assert same == first
    shutil.rmtree(moved / "stages" / "small")
    tracking, second = train(moved, [9.0, 8.0])
    assert second != first
    assert history(tracking, first, "small/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert history(tracking, second, "small/loss") == [(0, 9.0), (1, 8.0)]
    assert tracking.client.get_run(second).data.params == {"batch": "8"}
    assert train(moved, [9.0, 8.0, 7.0])[1] == second
    assert history(tracking, second, "small/loss") == [(0, 9.0), (1, 8.0), (2, 7.0)]


def test_a_note_that_is_refused_for_good_does_not_block_the_others(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = open_tracking(workdir)
    tracking.tag({"a tag name that MLflow does not take: $": "1"})
    tracking.tag({"good": "1"})
    assert tracking.finish() == 0
    assert caplog.text.count("refuses the tags of the recipe for good") == 1
    assert tracking.client.get_run(tracking.run_id).data.tags["good"] == "1"


def test_an_upload_does_not_slow_the_training_thread(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appending is what the training thread pays for tracking: microseconds, though MLflow holds a call up."""
    tracking = open_tracking(workdir)
    stage = tracking.stage("small", {})
    asked, release = threading.Event(), threading.Event()
    point = {"small/loss": 1.0, "small/attention": 1.0, "small/value": 1.0, "lr": 0.1}

    def hold(*_: Any, **__: Any) -> None:
        asked.set()
        release.wait()

    monkeypatch.setattr(tracking.client, "log_batch", hold)
    stage.follow([workdir / "m.jsonl"])
    with MetricsFile(workdir / "m.jsonl") as log:
        log.append(0, point)
        assert asked.wait(60)
        began = time.thread_time()
        for step in range(1, 2001):
            log.append(step, point)
        assert (time.thread_time() - began) / 2000 < 1e-3
    release.set()
    stage.finish("KILLED", timeout_seconds=0)


@pytest.mark.slow
def test_a_real_server_that_is_stopped_and_restarted_gets_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    workdir = tmp_path / "work"
    workdir.mkdir()
    with MetricsFile(workdir / "m.jsonl") as log:
        with server(tmp_path, port) as url:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
            tracking = open_tracking(workdir)
            stage = tracking.stage("small", {})
            uploader = stage.follow([workdir / "m.jsonl"])
            for step in range(1200):
                log.append(step, {"small/loss": math.nan if step == 7 else step, "learning_rate": 0.5})
            deadline = time.monotonic() + 60
            while uploader.num_sent < 1200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        for step in range(1200, 1500):  # nobody is there
            log.append(step, {"small/loss": step, "learning_rate": 0.5})
        deadline = time.monotonic() + 60
        while uploader.num_failures == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stage.tag({"said": "while it was away"})
        with server(tmp_path, port):
            for step in range(1500, 1600):
                log.append(step, {"small/loss": step, "learning_rate": 0.5})
            assert stage.finish(timeout_seconds=90) == 0
            assert tracking.finish() == 0
            assert tracking.look.startswith(url)
            losses = history(tracking, stage.run_id, "small/loss")
            assert [step for step, _ in losses] == list(range(1600))
            assert math.isnan(losses[7][1])
            run = tracking.client.get_run(stage.run_id)
            assert run.info.status == "FINISHED"
            assert run.data.tags["said"] == "while it was away"
    assert (
        len([record for record in caplog.records if "points could not be sent to" in record.getMessage()])
        == 1
    )


def test_a_damaged_state_is_an_error_in_one_line(workdir: Path) -> None:
    (workdir / "tracking.json").write_text("{")
    with pytest.raises(
        UserError, match="tracking.json is damaged: remove it, and the run gets new MLflow runs"
    ):
        open_tracking(workdir)


def test_a_server_that_lets_calls_hang_is_left_alone_for_a_while(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = open_tracking(workdir)
    calls, now = [], [0.0]

    def hang(*arguments: Any) -> None:
        calls.append(arguments)
        now[0] += 1.0
        raise ConnectionError("timed out")

    with monkeypatch.context() as patch:
        patch.setattr("minilm.orchestrator.tracking.outbox.time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(tracking.client, "get_run", hang)
        for i in range(3):
            tracking.tag({f"t{i}": "1"})
        assert len(calls) == 1
        tracking.finish()  # the end is worth another try
        assert len(calls) == 2
    assert tracking.flush(at_once=True) == 0
    assert {"t0", "t2"} <= tracking.client.get_run(tracking.run_id).data.tags.keys()


def test_a_renamed_experiment_keeps_a_run_together(workdir: Path) -> None:
    first = open_tracking(workdir)
    again = Tracking.open(workdir, "renamed", name="tiny", params=RECIPE, tags={})
    stage = again.client.get_run(again.stage("small", {}).run_id)
    assert stage.info.experiment_id == first.client.get_run(first.run_id).info.experiment_id


def test_nothing_process_wide_is_touched(workdir: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    open_tracking(workdir).stage("small", {}).finish()
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before
