"""A server that refuses is told apart from one that is away, at every call, with what to set."""

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.schema import Tracking as Section
from minilm.orchestrator.stage.metrics_file import MetricsFile
from minilm.orchestrator.tracking.calls import patiently
from minilm.orchestrator.tracking.client import connect
from minilm.orchestrator.tracking.pull import pull
from minilm.orchestrator.tracking.registry import check_rights, promote, register, resolve
from minilm.orchestrator.tracking.tracking import Tracking, flush_pending
from tests.mlflow_server import ADMIN, add_user, server
from tests.ports import free_port

SET = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to "
BOB = ("bob", "bobs-long-password")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where ~/.mlflow/credentials would be
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def be(user: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def open_tracking(workdir: Path, experiment: str = "experiment") -> Tracking:
    return Tracking.open(workdir, experiment, name="tiny", params={}, tags={})


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("weights")
    return path


@pytest.fixture
def gate() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """A server in front of MLflow, as a company has it: its address, and what it answers everything with."""
    answer = [(401, "<html>Sign in</html>")]

    class Gate(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer[-1]
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *args: object) -> None:
            pass

    gate = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=gate.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{gate.server_port}", answer
    gate.shutdown()
    gate.server_close()


def test_every_call_says_that_it_was_refused_and_does_not_wait(gate, tmp_path, monkeypatch):
    url, answer = gate
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    folder = model_folder(tmp_path / "m")
    calls: list[Callable[[], Any]] = [
        lambda: open_tracking(tmp_path),
        lambda: register(url, "a", folder, run_id="r", alias="newest"),
        lambda: resolve(url, "models:/a@newest"),
        lambda: promote(url, "a", 1, "best"),
        lambda: pull(url, "models:/a@newest", tmp_path / "out"),
        lambda: check_rights(url, ["a"]),
    ]
    for user, whom in [(None, "to talk without credentials"), (BOB, "user 'bob'")]:
        if user:
            be(user, monkeypatch)
        for status, text in [
            (401, f"refused {whom} (401, not authenticated): {SET}what it knows"),
            (403, f"refused {whom} (403, permission denied for mlflow/"),
        ]:
            answer.append((status, "<html>\nno\n</html>"))
            for call in calls:
                with pytest.raises(UserError) as error:
                    call()
                said = str(error.value)
                assert f"MLflow at {url} {text}" in said and "\n" not in said
                assert "does not answer" not in said and BOB[1] not in said and error.value.exit_code == 2
                assert status == 401 or f"or {SET}those of somebody who has it" in said
    answer.append((403, "Invalid Host header - possible DNS rebinding attack detected"))
    with pytest.raises(UserError, match="refused the host name .*: start it with --allowed-hosts"):
        open_tracking(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_right_that_is_taken_away_while_training_stops_nothing(
    gate, tmp_path, empty_store, monkeypatch, caplog
):
    url, answer = gate
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    tracking = open_tracking(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    with pytest.raises(UserError, match="refused to talk without credentials"):  # before anything is trained
        open_tracking(tmp_path)
    tracking.runs.client = connect(url)
    stage = tracking.stage("small", {"batch": 8})
    uploader = stage.follow([tmp_path / "m.jsonl"])
    with MetricsFile(tmp_path / "m.jsonl") as log:
        log.append(0, {"small/loss": 1.0})
    deadline = time.monotonic() + 60
    while not uploader.num_failures:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stage.finish("KILLED", timeout_seconds=0.1) and tracking.finish("KILLED")
    flush_pending(tmp_path, "experiment")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("minilm.")]
    assert len([text for text in said if "could not be told; what is left stays in" in text]) == 2
    assert len([text for text in said if "points could not be sent to tracking" in text]) == 1
    assert len([text for text in said if f"(401, not authenticated): {SET}what it knows" in text]) == 3
    assert "does not answer" not in caplog.text


def test_an_alias_that_mlflow_would_refuse_after_training_is_refused_before(tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(store)
    run = client.create_run(client.create_experiment("e", artifact_location=(tmp_path / "a").as_uri()))
    folder = model_folder(tmp_path / "m")
    for alias in ("latest", "v1", "v27"):
        with pytest.raises(UserError, match="refused: .*reserved"):
            register(store, "m", folder, run_id=run.info.run_id, alias=alias)
        with pytest.raises(
            ValidationError, match=r"that MLflow does not keep for itself \(latest, v1, v2, …\)"
        ):
            Section(experiment="e", alias=alias)
    assert Section(experiment="e", alias="v1-good").alias == "v1-good"


def test_a_bucket_that_refuses_the_files_is_told_with_its_own_variables(
    gate, tmp_path, empty_store, monkeypatch
):
    url, answer = gate
    answer.append((403, ""))
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(store)
    run = client.create_run(client.create_experiment("e", artifact_location="s3://bucket/files"))
    folder = model_folder(tmp_path / "m")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    with pytest.raises(UserError, match="keeps its files in a bucket that refused .*403") as error:
        register(store, "m", folder, run_id=run.info.run_id, alias="newest")
    said = str(error.value)
    assert "set that bucket's credentials, such as AWS_ACCESS_KEY_ID" in said
    assert "\n" not in said and "s3cret" not in said


def test_a_package_that_the_files_need_is_named():
    with pytest.raises(
        UserError, match="where package 'no_such_package' is needed: install it here, or start"
    ):
        patiently("http://h", lambda: importlib.import_module("no_such_package"), 0.0)


def test_asking_for_the_right_leaves_nothing_in_the_registry(tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(store)
    client.create_registered_model("there")
    before = client.get_registered_model("there")
    check_rights(store, ["there", "new"])
    assert [model.name for model in client.search_registered_models()] == ["there"]
    assert client.search_model_versions() == []
    assert dict(client.get_registered_model("there")) == dict(before)


WITHOUT_OUR_CODE = """
import sys, mlflow
from transformers import AutoModel, AutoTokenizer
teacher, out = sys.argv[1:]
found = mlflow.artifacts.download_artifacts("models:/theirs/1", dst_path=out)
AutoModel.from_pretrained(found)
mlflow.set_experiment("logged by mlflow")
parts = {"model": AutoModel.from_pretrained(teacher), "tokenizer": AutoTokenizer.from_pretrained(teacher)}
with mlflow.start_run():
    mlflow.transformers.log_model(
        parts, name="m", registered_model_name="logged", task="feature-extraction", pip_requirements=[])
assert "minilm" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_with_users(tmp_path, monkeypatch, teacher, shards, capsys):
    """Nobody, a wrong password, a user without the right, one who has it: with MLflow's own basic authentication."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a slow machine
    folder = model_folder(tmp_path / "m")
    with server(tmp_path, free_port(), auth=True) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        add_user(url, *BOB)
        with pytest.raises(UserError, match=r"refused to talk without credentials \(401"):
            open_tracking(tmp_path)
        be((BOB[0], "wrong"), monkeypatch)
        with pytest.raises(UserError, match=r"refused user 'bob' \(401"):
            open_tracking(tmp_path)

        be(ADMIN, monkeypatch)
        (tmp_path / "admin").mkdir()
        theirs = open_tracking(tmp_path / "admin")
        registered = register(url, "theirs", teacher, run_id=theirs.run_id, alias="newest")
        assert main(["register", str(teacher), "taken-small"]) == 0

        be(BOB, monkeypatch)
        with pytest.raises(UserError, match=r"refused user 'bob' \(403, permission denied for mlflow/runs/"):
            open_tracking(tmp_path)  # in an experiment of somebody else
        assert pull(url, "models:/theirs@newest", tmp_path / "out").digest == registered.digest
        with pytest.raises(UserError, match=r"refused user 'bob' \(403, permission denied for mlflow/regist"):
            promote(url, "theirs", 1, "best")
        (tmp_path / "bob").mkdir()
        own = open_tracking(tmp_path / "bob", "bobs")
        with pytest.raises(UserError, match="model 'theirs' can't be registered: .* refused user 'bob'"):
            check_rights(url, ["bobs", "theirs"])
        with pytest.raises(UserError, match=r"refused user 'bob' \(403"):
            register(url, "theirs", folder, run_id=own.run_id, alias="newest")
        check_rights(url, ["bobs"])
        client = connect(url)
        assert {model.name for model in client.search_registered_models()} == {"theirs", "taken-small"}
        assert len(client.search_model_versions()) == 2
        assert register(url, "bobs", folder, run_id=own.run_id, alias="newest").version == 1
        check_rights(url, ["bobs"])
        stage = {"name": "small", "teacher": "models:/theirs@newest", "student": {"layers": 1, "hidden": 24}}
        stage |= {"batch": 8, "steps": 3, "peak_lr": 1e-3, "warmup_steps": 1}
        values = {
            "name": "taken",
            "data": {"shards": str(shards)},
            "stages": [stage],
            "compute": {"micro_batch": 4},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        run = ["run", str(tmp_path / "r.yaml"), "--launcher", "inline", "--workdir", str(tmp_path / "work")]
        assert main(run) == 2
        assert "model 'taken-small' can't be registered: " in capsys.readouterr().err
        assert not list((tmp_path / "work" / "stages").glob("*/metrics.jsonl"))  # before the first step

        command = [sys.executable, "-P", "-c", WITHOUT_OUR_CODE, str(teacher), str(tmp_path / "plain")]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        pull(url, "models:/logged/1", tmp_path / "logged")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (tmp_path / "logged").iterdir()
        }
        with pytest.raises(UserError, match=r"refused user 'bob' \(403, permission denied for mlflow-artif"):
            patiently(url, lambda: client.log_artifact(theirs.run_id, str(folder / "config.json")), 0.0)
