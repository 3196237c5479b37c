"""`minilm register`, and a recipe that takes teacher and start from the registry, by the commands themselves."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from minilm.model.export import weights_digest
from minilm.orchestrator.cli import main
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.tracking.client import connect
from tests.conftest import make_teacher


@pytest.fixture
def work(tmp_path: Path, empty_store: Path) -> Path:
    """A work directory with a registry that holds nothing."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path / "work"


def test_a_recipe_takes_its_teacher_and_its_students_start_from_the_registry(
    work, teacher, shards, tmp_path, capsys
):
    start = make_teacher(tmp_path / "start", layers=2, hidden=24)
    for folder, name in [(teacher, "big"), (start, "small-bert")]:
        assert main(["register", str(folder), name, "--alias", "good", "--workdir", str(work)]) == 0
        assert f"{folder} is models:/{name}/1 now, and models:/{name}@good" in capsys.readouterr().out
    stage = {"name": "small", "teacher": "models:/big@good", "batch": 8, "steps": 3, "peak_lr": 1e-3}
    stage |= {"warmup_steps": 1, "held_out_rows": 8}
    stage |= {"student": {"layers": 2, "hidden": 24, "init": "models:/small-bert@good", "start_share": 0.5}}
    recipe = tmp_path / "r.yaml"
    values = {"name": "r", "data": {"shards": str(shards)}, "stages": [stage]}
    recipe.write_text(
        yaml.safe_dump(values | {"compute": {"micro_batch": 4, "threads": 1}, "tracking": {"log_every": 1}})
    )
    assert main(["check", str(recipe)]) == 0
    assert main(["run", str(recipe), "--workdir", str(work), "--launcher", "inline"]) == 0

    folder = RunFolder(work).stage("small")
    (student,) = StageSpec.from_json(folder.spec.read_text()).students
    assert (student.init, student.start) == (
        "models:/small-bert@good",
        str(work / "teachers" / "small-bert-v1"),
    )
    assert student.start_share == 0.5
    assert student.start_digest == weights_digest(start) and (student.heads, student.ffn) == (4, 96)
    assert f"models:/small-bert@good (weights {student.start_digest[:12]})" in (
        (folder.student("small") / "README.md").read_text()
    )
    client = connect(f"sqlite:///{work / 'mlflow.db'}")
    page = client.get_model_version("r-small", "1")
    assert (
        page.description.startswith("# small\n")
        and "| Started from | models:/small-bert@good" in page.description
    )
    assert {"minilm.layers": "2", "minilm.hidden": "24", "minilm.steps": "3"}.items() <= page.tags.items()
    parents = client.search_runs(
        [client.get_experiment_by_name("r").experiment_id], "tags.`minilm.run` = 'recipe'"
    )
    compared = parents[0].data.metrics
    assert compared["small/heldout_sum"] == pytest.approx(float(page.tags["minilm.heldout_sum"]), rel=1e-3)
    assert set(compared) == {"small/heldout/attention", "small/heldout/value", "small/heldout_sum"}
    (trained,) = client.search_runs([parents[0].info.experiment_id], "tags.`minilm.run` = 'stage small'")
    assert 0 < trained.data.metrics["system/system_memory_usage_percentage"] < 100
    assert 0 <= trained.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert parents[0].inputs.dataset_inputs[0].dataset.name == "corpus-1"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
            "pytorch_model.bin: only .json, .* files are taken",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has no model.safetensors; give the folder that save_pretrained",
        ),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
            "architecture 'gpt2' has no tap",
        ),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_a_folder_that_is_no_safe_encoder_is_not_registered(work, teacher, tmp_path, spoil, words, capsys):
    folder = tmp_path / "m"
    shutil.copytree(teacher, folder)
    spoil(folder)
    assert main(["register", str(folder), "big", "--workdir", str(work)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minilm: error: ") and said.count("\n") == 1

    assert re.search(words, said)
    assert connect(f"sqlite:///{work / 'mlflow.db'}").search_registered_models() == []


def test_a_registry_of_a_new_work_directory_is_made(teacher, tmp_path, capsys):
    assert main(["register", str(teacher), "big", "--workdir", str(tmp_path / "new")]) == 0
    assert (
        main(["pull", "models:/big@newest", str(tmp_path / "out"), "--workdir", str(tmp_path / "new")]) == 0
    )
    assert weights_digest(tmp_path / "out") == weights_digest(teacher)


def test_a_name_that_mlflow_does_not_take_leaves_nothing(work, teacher, capsys):
    assert main(["register", str(teacher), "a/b", "--workdir", str(work)]) == 2
    assert "model 'a/b' can't be registered: " in capsys.readouterr().err
    client = connect(f"sqlite:///{work / 'mlflow.db'}")
    assert [found.name for found in client.search_experiments()] == ["Default"]


def test_an_alias_that_mlflow_keeps_is_refused_before_anything_is_stored(work, teacher, capsys):
    for alias in ("latest", "V2", "a b"):
        with pytest.raises(SystemExit):
            main(["register", str(teacher), "big", "--alias", alias, "--workdir", str(work)])
        assert "but none that MLflow keeps for itself (latest, v1, …)" in capsys.readouterr().err
