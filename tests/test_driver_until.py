"""A recipe whose stage ends when it is good enough, from the driver's side: check, plan, run, status, MLflow."""

from __future__ import annotations

import json

import pytest
import yaml
from mlflow import MlflowClient

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.run_status import run_status
from minilm.orchestrator.recipe.changes import invalidated_stages
from minilm.orchestrator.recipe.load import load_recipe
from tests.eval_data import write_stsb
from tests.test_driver_curriculum import write_recipe


@pytest.fixture
def recipe(tmp_path, text, teacher):
    write_stsb(tmp_path / "tasks", glue=False)
    path = write_recipe(tmp_path, text, teacher)
    values = yaml.safe_load(path.read_text())
    (stage,) = values["stages"] = values["stages"][:1]
    stage |= {
        "schedule": "wsd",
        "decay_steps": 5,
        "evaluate": [
            {"probe": "stsb-embed", "every": 4, "data": "tasks"},  # from the recipe's folder
            {"probe": "knn", "every": 10},
        ],
        "until": {"probe": "stsb-embed", "patience": 1, "min_gain": 1.0},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_stage_ends_when_it_is_good_enough_and_everybody_says_so(recipe, tmp_path, capsys):
    assert main(["check", str(recipe)]) == 0
    assert "assistant (at most 40 steps)" in capsys.readouterr().out
    assert main(["plan", str(recipe), "--tokens-per-second", "1000"]) == 0
    plan = capsys.readouterr().out
    assert (
        "stage assistant: at most 40 steps of 8 x 32 tokens" in plan and "time          at most 10s" in plan
    )

    work = tmp_path / "work"
    run = ["run", str(recipe), "--launcher", "inline", "--workdir", str(work), "--json"]
    assert main(run) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # step 4 has a first value, 8 no gain of all of it; the decay has 5 steps
    shown = [one["text"] for one in told if one["event"] == "progress" and " step " in one["text"]]
    assert any("step 0/at most 40" in line for line in shown) and "step 13/13" in shown[-1]
    (stage,) = run_status(work).stages
    assert (stage.step, stage.steps, set(stage.held_out["assistant"]["terms"])) == (
        13,
        13,
        {"attention", "value"},
    )
    shown = run_status(work).text()
    assert "13 of 13" in shown
    assert "until stsb-embed has no gain in 1 measurements (met: 13 steps in all)" in shown
    value, share = (stage.probes["assistant"][f"stsb-embed{end}"] for end in ("", "/share-of-teacher"))
    assert f"  assistant  stsb-embed {value:.3f} ({share:.0%} of the teacher's), knn " in shown

    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    (version,) = client.search_model_versions("name='tiny-assistant'")
    assert version.tags["minilm.steps"] == "13"
    history = client.get_metric_history(version.run_id, "assistant/heldout/probe/stsb-embed")
    assert [point.step for point in history] == [0, 4, 8, 12, 13]
    history = client.get_metric_history(version.run_id, "assistant/heldout/probe/knn")
    assert [point.step for point in history] == [0, 10, 13]
    assert main(run) == 0
    assert "every stage of tiny is done already" in capsys.readouterr().out


def test_what_of_the_probes_determines_the_result(recipe):
    """Those that `until` reads do, and how often; the others are measured or not, as one likes, in the same work
    directory."""
    values = yaml.safe_load(recipe.read_text())

    def useless(**changes) -> dict[str, str]:
        other = recipe.with_name("other.yaml")
        other.write_text(yaml.safe_dump(values | {"stages": [values["stages"][0] | changes]}))
        before, now = ({"recipe": load_recipe(path).result_fields()} for path in (recipe, other))
        return invalidated_stages(before, now)

    similarity, knn = values["stages"][0]["evaluate"]
    assert not useless(evaluate=[similarity | {"data": "elsewhere"}, knn | {"every": 3}, {"probe": "cka"}])
    assert useless(evaluate=[similarity | {"every": 2}]) == {
        "assistant": "stages.assistant.until.every is 4 there and 2 now"
    }
    assert (
        "until.patience is 1 there and 2 now"
        in useless(until=values["stages"][0]["until"] | {"patience": 2})["assistant"]
    )
    plain = values["stages"][0] | {"schedule": "linear"}
    for key in ("decay_steps", "until", "evaluate"):
        del plain[key]
    values["stages"] = [plain]
    recipe.write_text(yaml.safe_dump(values))
    assert not {"decay_steps", "until", "evaluate"} & set(load_recipe(recipe).result_fields()["stages"][0])


def test_a_probe_without_data_of_its_own_reads_where_the_evaluation_does(recipe):
    values = yaml.safe_load(recipe.read_text())
    del values["stages"][0]["evaluate"][0]["data"]
    values["evaluation"] = {"tasks": ["stsb-embed"], "data": "tasks"}
    recipe.write_text(yaml.safe_dump(values))
    similarity, knn = load_recipe(recipe).stages[0].evaluate
    assert similarity.data == str(recipe.parent / "tasks") and knn.data is None
