"""Models that others registered with MLflow alone: the weights are taken, pickles never."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.model.encoder.build import load_encoder
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.references import RegistryRef
from minilm.orchestrator.resolve.folders import model_folder
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.tracking.client import connect
from minilm.orchestrator.tracking.foreign_models import plain_folder
from minilm.orchestrator.tracking.pull import pull

LOGGED = ["MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "LICENSE.txt"]
TOKENIZER = ["components/tokenizer/tokenizer.json", "components/tokenizer/tokenizer_config.json"]
WEIGHTS = ["model/config.json", "model/model.safetensors"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, teacher: Path) -> str:
    """A store with a model that somebody without this project has logged, its files beside it."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    code = (
        "import sys, mlflow\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "folder, teacher = sys.argv[1:]\n"
        "mlflow.set_tracking_uri(f'sqlite:///{folder}/mlflow.db')\n"
        "mlflow.create_experiment('theirs', artifact_location=f'file://{folder}/artifacts')\n"
        "mlflow.set_experiment('theirs')\n"
        "parts = {'model': AutoModelForMaskedLM.from_pretrained(teacher)}\n"
        "parts['tokenizer'] = AutoTokenizer.from_pretrained(teacher)\n"
        "with mlflow.start_run():\n"
        "    mlflow.transformers.log_model(\n"
        "        parts, name='theirs', registered_model_name='theirs', task='fill-mask', pip_requirements=[])\n"
        "assert 'minilm' not in sys.modules\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", code, str(folder), str(teacher)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return f"sqlite:///{folder}/mlflow.db"


def test_a_model_of_mlflows_own_logging_is_a_teacher(store, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = model_folder(RegistryRef("models:/theirs/1"), RunFolder(tmp_path))
    assert folder == tmp_path / "teachers" / "theirs-v1"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    theirs = load_encoder(folder, head=True).model.state_dict()
    own = load_encoder(teacher).model.state_dict()
    assert all(theirs[f"bert.{name}"].equal(own[name]) for name in own if not name.startswith("pooler."))
    assert (folder / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_a_pickle_beside_the_weights_stays_where_it_is(store, tmp_path, caplog):
    source = connect(store).get_model_version_download_uri("theirs", "1")
    stored = Path(source.removeprefix("file://"))
    (stored / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (stored / "model" / "modeling.py").write_text("raise SystemExit")
    pull(store, "models:/theirs/1", tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").rglob("*")} == {".json", ".safetensors"}
    assert "models:/theirs/1 was not registered by this project: it has no digest" in caplog.text
    (stored / "model" / "model.safetensors").rename(stored / "weights")
    with pytest.raises(UserError, match="models:/theirs/1 has its weights in model/pytorch_model.bin, which"):
        pull(store, "models:/theirs/1", tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ([*LOGGED, *WEIGHTS, *TOKENIZER], [*WEIGHTS, *TOKENIZER]),
        ([*LOGGED, *WEIGHTS, "model/rust_model.ot", "model/train.py"], WEIGHTS),  # a model without tokenizer
        (
            [*LOGGED, "model/config.json", *(f"model/model-0000{i}-of-00002.safetensors" for i in (1, 2))],
            ["model/config.json", *(f"model/model-0000{i}-of-00002.safetensors" for i in (1, 2))],
        ),
        ([*LOGGED, *WEIGHTS, "components/tokenizer/spm.model"], [*WEIGHTS, "components/tokenizer/spm.model"]),
        (
            ["config.json", "model.safetensors", "vocab.txt", "onnx/model.onnx", ".gitattributes"],
            3,
        ),  # a hub's
        (
            [
                f"model.sentence_transformer/{file}"
                for file in ("config.json", "model.safetensors", "vocab.txt")
            ]
            + ["model.sentence_transformer/2_Dense/config.json", "MLmodel"]
            + ["model.sentence_transformer/2_Dense/model.safetensors"],
            3,
        ),
        ([*WEIGHTS, "components/feature_extractor/vocab.json", *TOKENIZER], [*WEIGHTS, *TOKENIZER]),
    ],
)
def test_layouts_of_other_flavours(files, taken):
    found = plain_folder(reversed(files), "models:/x/1")
    assert sorted(found) == sorted(files[:taken] if isinstance(taken, int) else taken)
    assert all(path.rpartition("/")[2] == name for path, name in found.items())
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            [*LOGGED, "data/model.pth"],
            "has its weights in data/model.pth, .* never read here: save the model with",
        ),
        ([*LOGGED, "model/config.json", "model/tf_model.h5"], "has its weights in model/tf_model.h5"),
        (
            [*LOGGED, "peft/adapter_config.json", "peft/adapter_model.safetensors", "peft/config.json"],
            r"holds an adapter \(peft/adapter_config.json\) without the model that it changes: merge them",
        ),
        (
            [*LOGGED, *TOKENIZER],
            r"has no folder with a config.json and safetensors weights: register a model with",
        ),
        (
            [*WEIGHTS, "other/config.json", "other/model.safetensors"],
            r"holds several models \(model, other\): download the one that is meant and register it by itself",
        ),
        ([*WEIGHTS, "model/../../x.json"], "names a file outside of itself"),
    ],
)
def test_what_is_no_model_is_told_with_what_to_do(files, text):
    with pytest.raises(UserError, match=text) as error:
        plain_folder(files, "models:/x/1")
    assert "\n" not in str(error.value)
