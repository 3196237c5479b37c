"""A recipe's `evaluation`: after the stages, resumable, the same numbers wherever its trials run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver import evaluation
from tests.eval_data import write_sst2, write_stsb

pytestmark = pytest.mark.timeout(900)


def write_recipe(folder: Path, text: Path, teacher: Path, **section: object) -> Path:
    """One stage of 4 steps, and its evaluation on files beside the recipe."""
    write_stsb(write_sst2(folder / "tasks", train=32, dev=12), glue=False)
    recipe = {
        "name": "tiny",
        "data": {"text": str(text), "tokenizer": str(teacher), "seq_len": 32, "held_out": 0.1},
        "stages": [
            {
                "name": "small",
                "teacher": str(teacher),
                "student": {"layers": 1, "hidden": 24},
                "batch": 8,
                "steps": 4,
                "peak_lr": 1e-3,
                "warmup_steps": 1,
                "held_out_rows": 8,
            }
        ],
        "evaluation": {"tasks": ["stsb-embed", "sst2"], "data": "tasks", "seeds": 2, **section},
        "compute": {"micro_batch": 4, "threads": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def trials(work: Path) -> dict[str, dict]:
    """Results by file, without what they took."""
    files = (work / "evaluation" / "trials").glob("*.json")
    return {path.name: json.loads(path.read_text()) | {"seconds": 0} for path in files}


def test_a_run_ends_with_an_evaluation_that_goes_on_after_a_death(
    tmp_path, text, teacher, capsys, monkeypatch
):
    recipe, work = write_recipe(tmp_path, text, teacher), tmp_path / "work"
    command = ["run", str(recipe), "--workdir", str(work)]
    whole = evaluation.one_trial

    def dies(given):
        if len(trials(work)) == 3:
            raise KeyboardInterrupt
        return whole(given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "one_trial", dies)
        assert main([*command, "--launcher", "inline"]) == 130
    before = trials(work)
    assert len(before) == 3 and not (work / "report.html").exists()

    assert main([*command, "--launcher", "inline"]) == 0
    out, err = capsys.readouterr()
    names = [str(teacher), "small", "random:small", f"layers:{teacher}:1x24"]
    assert all(name in out + err for name in names) and "sst2: small - random:small" in out + err
    found = trials(work)
    assert before.items() <= found.items()
    assert (
        len(found) == (1 + 1 + 2 + 1) + 4 * 2
    )  # one similarity each, two draws of the random one; two seeds
    page = (work / "report.html").read_text()
    assert all(name in page for name in names)

    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {"Evaluation", "small"} < set(runs)
    assert {a.path for a in client.list_artifacts(runs["Evaluation"].info.run_id)} == {
        "report.html",
        "report.md",
    }
    assert "glue-fixed/sst2/accuracy/random_small" in runs["tiny"].data.metrics

    assert main([*command, "--launcher", "inline"]) == 0
    assert "every stage of tiny is done already" in "".join(capsys.readouterr())

    shutil.rmtree(
        work / "evaluation"
    )  # on Ray, two at a time: the same numbers, and no stage is trained again
    assert main([*command, "--set", "compute.workers=2"]) == 0
    assert "done before" in "".join(capsys.readouterr())
    assert trials(work) == found


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tasks": ["colla"]}, "evaluation: no task is called 'colla'; did you mean 'cola'?"),
        ({"tasks": ["cola"]}, "evaluation: task cola has no folder in"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_check_and_run_refuse_what_cannot_be_evaluated(tmp_path, text, teacher, capsys, section, message):
    recipe = write_recipe(tmp_path, text, teacher, **section)
    there = "data" not in section
    assert main(["check", str(recipe)]) == (2 if there else 0)
    assert message in "".join(capsys.readouterr())
    assert main(["run", str(recipe), "--workdir", str(tmp_path / "w"), "--launcher", "inline"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "w" / "data").exists()


@pytest.mark.slow
def test_stages_that_are_added_or_done_again_are_evaluated(tmp_path, text, teacher):
    recipe, work = write_recipe(tmp_path, text, teacher, tasks=["stsb-embed"]), tmp_path / "work"
    command = ["run", str(recipe), "--workdir", str(work), "--launcher", "inline"]
    assert main(command) == 0
    before = trials(work)
    values = yaml.safe_load(recipe.read_text())
    values["stages"].append(values["stages"][0] | {"name": "smaller", "teacher": "small"})
    recipe.write_text(yaml.safe_dump(values))
    assert main(command) == 0
    assert before.items() < trials(work).items() and "smaller" in (work / "report.md").read_text()
    (work / "report.md").unlink()
    assert main([*command, "--from", "smaller"]) == 0
    assert (work / "report.md").exists()


@pytest.mark.parametrize("break_it", ["row", "tokenizer"])
def test_what_an_evaluation_would_refuse_is_refused_before_any_training(
    tmp_path, text, teacher, capsys, break_it
):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    recipe = write_recipe(tmp_path, text, folder)
    if break_it == "row":
        file = tmp_path / "tasks" / "SST-2" / "dev.tsv"
        file.write_text(file.read_text().replace("\t1\n", "\tpositive\n", 1))
        message = "evaluation: " + str(file)
    else:
        for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*")):
            path.unlink()
        recipe.write_text(recipe.read_text().replace(f"tokenizer: {folder}", f"tokenizer: {teacher}"))
        message = f"evaluation: the teacher has no tokenizer in {folder}, and it is scored too"
    assert main(["check", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", str(recipe), "--workdir", str(tmp_path / "w"), "--launcher", "inline"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "w" / "data").exists()
