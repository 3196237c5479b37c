"""A registered version by what MLflow's users type, in an environment without this project; nothing of it is code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.models import EvaluationResult, MetricThreshold, Model
from mlflow.models.evaluation.validation import ModelValidationFailedException

from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.tracking.client import connect
from minilm.orchestrator.tracking.mlflow_files import EXAMPLE, write_mlflow_files
from minilm.orchestrator.tracking.registry import make_run, register
from tests.conftest import make_teacher
from tests.eval_data import write_stsb
from tests.mlflow_server import ADMIN, server
from tests.plain_env import make_plain_env
from tests.ports import free_port


def test_what_mlflow_reads_names_no_code(teacher, tmp_path):
    write_mlflow_files(teacher, tmp_path, model_id="m-1", run_id="r")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.rpartition(".")[2] for path in files} == {"MLmodel", "json", "txt", "yaml"}
    values = yaml.safe_load((tmp_path / "MLmodel").read_text())
    assert values["flavors"]["python_function"]["loader_module"] == "mlflow.transformers"
    flavour = values["flavors"]["transformers"]
    assert (flavour["pipeline_model_type"], flavour["tokenizer_type"]) == ("AutoModel", "AutoTokenizer")
    assert flavour["code"] is None and "code" not in values["flavors"]["python_function"]
    model = Model.load(str(tmp_path / "MLmodel"))
    assert model.load_input_example(str(tmp_path)) == EXAMPLE
    assert json.loads(model.get_serving_input(str(tmp_path))) == {"inputs": EXAMPLE}
    assert model.signature.outputs.inputs[0].shape == (-1, 48)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_names_code_of_its_own_is_not_taken(teacher, tmp_path, file):
    folder = shutil.copytree(teacher, tmp_path / "m")
    values = json.loads((folder / file).read_text()) | {"auto_map": {"AutoModel": "OWNER/NAME--model.Own"}}
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=rf"{file} names code of the model's own \(auto_map\), .* remove that key"
    ):
        register(f"sqlite:///{tmp_path}/mlflow.db", "own", folder, run_id="r", alias="newest")


CLIENT = """
import sys
import numpy as np
from mlflow import artifacts, pyfunc, transformers as flavour
from transformers import AutoModel, AutoTokenizer
uri, folder = sys.argv[1:]
model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text = "time year people"
wanted = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach().numpy()
loaded = flavour.load_model(uri)
assert np.allclose(np.array(loaded(text))[0], wanted, atol=1e-5)
assert [np.array(one).shape[1] for one in loaded([text, "man"])] == [5, 3]
served = pyfunc.load_model(uri)
for given in (text, [text]):
    assert np.allclose(served.predict(given), wanted, atol=1e-5), given
assert served.predict("time " * 500).shape == (64, 48)
assert served.metadata.get_input_schema() and served.input_example
np.save("wanted.npy", wanted)
try:
    import minilm
except ImportError:
    print("no minilm here")
"""


def answer(url: str, text: str) -> list[list[float]]:
    call = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps({"inputs": [text]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=60) as response:
        return json.load(response)["predictions"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("auth", [False, True], ids=["open", "basic-auth"])
def test_mlflows_own_commands_load_and_serve_it(teacher, tmp_path, monkeypatch, auth):
    import numpy as np

    teacher = shutil.copytree(teacher, tmp_path / "exported")
    config = teacher / "tokenizer_config.json"  # as an export has it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 64}))
    python = make_plain_env(tmp_path / "env")
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if auth:
        for name, value in zip(("USERNAME", "PASSWORD"), ADMIN, strict=True):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
            environment[f"MLFLOW_TRACKING_{name}"] = value

    def client(*arguments: str) -> str:
        command = [str(python.parent / arguments[0]), *arguments[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with server(tmp_path, free_port(), auth=auth) as url:
        environment["MLFLOW_TRACKING_URI"] = url
        run_id = make_run(url, "small", teacher, experiment="clients")
        register(url, "small", teacher, run_id=run_id, alias="good")
        client("mlflow", "artifacts", "download", "-u", "models:/small@good", "-d", "down")
        down = tmp_path / "down"
        for file in teacher.iterdir():
            assert (down / file.name).read_bytes() == file.read_bytes()
        assert (
            client("python", "-c", CLIENT, "models:/small@good", str(down)).splitlines()[-1]
            == "no minilm here"
        )

        port = free_port()
        command = [
            str(python.parent / "mlflow"),
            "models",
            "serve",
            "-m",
            "models:/small@good",
            "-p",
            str(port),
        ]
        with (tmp_path / "serve.log").open("wb") as log:
            serving = subprocess.Popen(
                [*command, "--env-manager", "local"],
                cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            for _ in range(600):
                assert serving.poll() is None, Path(tmp_path / "serve.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            found = answer(f"http://127.0.0.1:{port}", "time year people")
            assert np.allclose(found, np.load(tmp_path / "wanted.npy"), atol=1e-5)
        finally:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gate_in_a_real_server(tmp_path, monkeypatch, capsys):
    """A worse candidate is refused with the failing line, a better one moves the alias; what is missing is scored."""
    data = write_stsb(tmp_path / "tasks", glue=False)
    folders = [
        make_teacher(tmp_path / f"m{layers}", layers=layers) for layers in (2, 3, 1)
    ]  # less is better here
    results = tmp_path / "results"
    with server(tmp_path, free_port()) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        for folder in folders:
            assert main(["register", str(folder), "m"]) == 0
        capsys.readouterr()
        given = ["--results", str(results), "--evaluate", "--data", str(data), "--max-drop", "0"]
        found = {}
        for version in (1, 2, 3):  # each against the best so far
            code = main(["promote", f"models:/m/{version}", "champion", *given])
            aliases = {k: int(v) for k, v in connect(url).get_registered_model("m").aliases.items()}
            tags = connect(url).get_model_version("m", str(version)).tags
            found[version] = (code, aliases, json.loads(tags.get("minilm.gate", "[]")), capsys.readouterr())
    scores = {r["model"]: r["metrics"]["spearman"] for r in map(read_json, (results / "trials").iterdir())}
    champion = 1
    outcomes = set()
    for version, (code, aliases, lines, said) in found.items():
        assert bool(lines) == (version > 1)  # the first has nothing to be compared with
        better = scores[f"models:/m/{version}"] >= scores[f"models:/m/{champion}"]
        if version > 1:
            outcomes.add(better)
            thresholds = {
                line["metric"]: MetricThreshold(line["threshold"], greater_is_better=True) for line in lines
            }
            result = EvaluationResult({line["metric"]: line["value"] for line in lines}, {})
            if better:  # MLflow's own validation says the same of what was recorded
                mlflow.validate_evaluation_results(thresholds, result)
            else:
                with pytest.raises(ModelValidationFailedException):
                    mlflow.validate_evaluation_results(thresholds, result)
                assert "fails  stsb-embed (spearman, embed-fast): " in said.out
                assert "champion stays where it is (1 of 1 lines fail), challenger is version" in said.err
        champion = version if better else champion
        assert code == (0 if better else 2)
        assert (aliases["champion"], aliases["challenger"]) == (champion, version)
    assert outcomes == {True, False}, scores
