"""A recipe's `evaluation`: after the stages, resumable, the same numbers wherever its trials run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from mlflow import MlflowClient

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver import evaluation
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.driver.summary import ModelEntry
from minilm.orchestrator.recipe.schema import Evaluation
from minilm.orchestrator.tracking.client import connect
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


def test_each_model_is_scored_once(teacher, capsys):
    """Two stages have one teacher, and their students one shape."""
    section = Evaluation.model_validate({"tasks": ["cola"], "data": "tasks"})
    models = [
        ModelEntry(name, role, 1, 48, 1, 1.0, {}, {}, "", str(teacher))
        for name, role in (("t", "teacher"), ("t", "teacher"), ("a", "student"), ("b", "student"))
    ]
    found = evaluation.sources_of(models, section, StatusLine(sys.stderr))
    assert [source.name for source in found] == ["t", "a", "b", "random:a", "layers:t:1x48", "random:b"]


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


@pytest.mark.parametrize("break_it", ["row", "pooling", "tokenizer"])
def test_what_an_evaluation_would_refuse_is_refused_before_any_training(
    tmp_path, text, teacher, capsys, break_it
):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    recipe = write_recipe(tmp_path, text, folder)
    if break_it == "row":
        file = tmp_path / "tasks" / "SST-2" / "dev.tsv"
        file.write_text(file.read_text().replace("\t1\n", "\tpositive\n", 1))
        message = "evaluation: " + str(file)
    elif break_it == "pooling":
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        modules += [
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 48, "pooling_mode_lasttoken": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        message = "evaluation: the teacher is scored too, and "
    else:
        for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*")):
            path.unlink()
        recipe.write_text(recipe.read_text().replace(f"tokenizer: {folder}", f"tokenizer: {teacher}"))
        message = f"evaluation: the teacher has no tokenizer in {folder}, and it is scored too"
    assert main(["check", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", str(recipe), "--workdir", str(tmp_path / "w"), "--launcher", "inline"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "w" / "data").exists()


def test_what_comes_after_the_stages_is_on_the_card_and_moves_the_alias(tmp_path, text, teacher, capsys):
    """Evaluation, card and gate; added to a finished recipe they are all that is left to do."""
    recipe, work = (
        write_recipe(tmp_path, text, teacher, tasks=["stsb-embed"], controls=False),
        tmp_path / "work",
    )
    command = ["run", str(recipe), "--workdir", str(work), "--launcher", "inline"]
    assert main(["check", str(recipe)]) == 0
    note = f"no licence is known of teacher {teacher} (its card, README.md, names none)"
    assert f"warning: {note}" in capsys.readouterr().out
    values = yaml.safe_load(recipe.read_text())
    section = values.pop("evaluation")
    recipe.write_text(yaml.safe_dump(values))
    assert main(command) == 0

    store = f"sqlite:///{work / 'mlflow.db'}"
    folder = work / "stages" / "small" / "students" / "small"
    before = ModelCard.load(folder / "README.md")
    assert "license" not in before.data.to_dict() and note in before.text
    tags = connect(store).get_model_version("tiny-small", "1").tags
    assert note in tags["minilm.licence"]

    values |= {
        "evaluation": section,
        "promote": {"min_share_of_teacher": 0.01},
        "card": {
            "license": "cc-by-nc-4.0",
            "language": ["en"],
            "base_model": "owner/bert",
            "datasets": ["o/d"],
        },
    }
    recipe.write_text(yaml.safe_dump(values))
    assert main(command) == 0
    out = "".join(capsys.readouterr())
    assert (
        "done before" in out and "models:/tiny-small@champion is version 1 now, and so is challenger" in out
    )
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0" and data["language"] == ["en"] and data["datasets"] == ["o/d"]
    assert (data["base_model"], data["base_model_relation"]) == ("owner/bert", "finetune")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "feature-extraction")
    (result,) = card.data.eval_results
    (own,) = [r for r in trials(work).values() if r["model"] == "small"]
    assert result.metric_value == pytest.approx(own["metrics"]["spearman"], abs=1e-6)
    assert card.text.strip().splitlines()[2].startswith("**Fine-tune it before use.**")
    assert "the licence cc-by-nc-4.0, by card.license, which forbids commercial use" in card.text
    assert (
        "| Steps | 4 done of 4 planned |" in card.text
        and "| Tokens | 1,024 (8 rows x 32 a step) |" in card.text
    )
    assert (
        " tokens; fingerprint " in card.text and "| Hardware | 1 x " in card.text and "torch 2" in card.text
    )
    aliases = connect(store).get_registered_model("tiny-small").aliases
    assert {k: int(v) for k, v in aliases.items()} == {"champion": 1, "challenger": 1, "newest": 1}
    pulled = tmp_path / "pulled"
    assert main(["pull", "models:/tiny-small@champion", str(pulled), "--workdir", str(work)]) == 0
    assert (pulled / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    run_id = connect(store).get_model_version("tiny-small", "1").run_id
    inputs = connect(store).get_run(run_id).inputs.dataset_inputs
    assert "stsb-embed" in {one.dataset.name for one in inputs}

    assert main(command) == 0 and "every stage of tiny is done already" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("promote", "message"),
    [
        ({"tasks": ["cola"]}, "promote.tasks: given 'cola', which evaluation.tasks does not run; allowed: "),
        ({"tasks": ["colla"]}, "no task is called 'colla'; did you mean 'cola'?"),
        ({"against": "newest"}, "promote: given 'newest', which tracking.alias moves to every new version before"),
        ({"alias": "challenger"}, "promote: given 'challenger', which moves to every candidate, whether or not its"),
        (None, "promote: the gate needs scores; add an evaluation section (tasks, data), or remove promote"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_checked_is_refused_before_anything_runs(
    tmp_path, text, teacher, capsys, promote, message
):
    recipe = write_recipe(tmp_path, text, teacher)
    values = yaml.safe_load(recipe.read_text()) | {"promote": promote or {}}
    if promote is None:
        del values["evaluation"]
    recipe.write_text(yaml.safe_dump(values))
    assert main(["check", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", str(recipe), "--workdir", str(tmp_path / "w"), "--launcher", "inline"]) == 2
    assert message in capsys.readouterr().err
