"""A recipe whose stage ends when it is good enough, from the driver's side: check, plan, run, status, MLflow."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from mlflow import MlflowClient

from minilm.orchestrator.checkpoint.format import FORMAT, sealed
from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.run_status import run_status
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.changes import invalidated_stages
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.stage.metrics_file import MetricsFile, read_all_metrics
from minilm.orchestrator.system.files import write_json
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
    # which of its lines a fast run shows is a matter of time
    assert all(re.search(r"step \d+/(at most 40|13)\b", line) for line in shown)
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


@pytest.mark.slow
def test_a_stage_is_done_again_from_a_checkpoint_that_was_kept(recipe, tmp_path, capsys):
    """To the bits of a run from step 0; what was logged before stays in the curves."""
    command = ["run", str(recipe), "--launcher", "inline", "--set", "compute.keep_every_steps=4", "--workdir"]
    ends = ["--set", "stages.assistant.steps=14", "--set", "stages.assistant.until=null"]
    assert main([*command, str(tmp_path / "scratch"), *ends]) == 0
    assert main([*command, str(tmp_path / "work")]) == 0
    assert main([*command, str(tmp_path / "work"), *ends, "--from", "assistant@12"]) == 2
    assert (
        "--from assistant@12: the decay begins at step 9; give more steps; allowed: 4, 8"
        in capsys.readouterr().err
    )
    assert main([*command, str(tmp_path / "work"), *ends, "--from", "assistant@8"]) == 0
    done = [
        json.loads((tmp_path / name / "stages" / "assistant" / "done.json").read_text())
        for name in ("work", "scratch")
    ]
    assert done[0] == done[1] and done[0]["steps"] == 14
    points = read_all_metrics(tmp_path / "work" / "stages" / "assistant" / "metrics.jsonl")
    assert [point.step for point in points] == [4, 8, 12, 14]


@pytest.fixture
def ended(recipe, tmp_path) -> Workdir:
    """A stage with checkpoints of steps 4 and 8, and of 11 in its decay; both logs have points up to there."""
    work = Workdir(tmp_path / "work")
    write_json(work.run, {"recipe": load_recipe(recipe).result_fields()})
    stage = work.stage("assistant")
    for step, trunk in ((4, "t"), (8, "t"), (11, "")):
        meta = sealed({"format": FORMAT, "step": step, "trunk": trunk})
        write_json(stage.checkpoints / f"step-{step:09d}-0a1b2c3d" / "checkpoint.json", meta)
    write_json(stage.spec, {"checkpoints": None})
    for path in (stage.step_metrics, stage.heldout_metrics):
        with MetricsFile(path) as points:
            for step in (4, 8, 11):
                points.append(step, {"a": float(step)})
    return work


@pytest.mark.parametrize(
    ("changes", "redo_from", "message"),
    [
        (
            [],
            "assistant@x",
            "--from assistant@x: given 'x' as step; allowed: STAGE, or STAGE@STEP as small@2000",
        ),
        ([], "@8", "--from @8: given no stage; allowed: STAGE, or STAGE@STEP as small@2000"),
        ([], "assistant@5", "--from assistant@5: there is no checkpoint of this step; allowed: 4, 8"),
        (
            [],
            "assistant@11",
            "--from assistant@11: the learning rate has begun to fall there, or it is damaged; allowed: 4, 8",
        ),
        (
            ["stages.assistant.steps=10"],
            "assistant@8",
            "--from assistant@8: the decay begins at step 5; give more steps; allowed: 4",
        ),
        (
            ["stages.assistant.peak_lr=0.1"],
            "assistant@8",
            "--from assistant@8: stages.assistant.peak_lr is 0.001 there and 0.1 now; only steps, schedule, "
            "decay_steps and until may differ; give --from assistant",
        ),
        (["seed=4"], "assistant@8", "--from assistant@8: seed is 0 there and 4 now; give --from assistant"),
        (
            [
                "stages.assistant.schedule=linear",
                "stages.assistant.decay_steps=null",
                "stages.assistant.until=null",
            ],
            "assistant@8",
            "--from assistant@8: the rates of stage assistant depend on where it ends, now or before; allowed with "
            "schedule wsd or constant; give --from assistant",
        ),
    ],
)
def test_a_branch_that_can_not_be_is_told_and_nothing_moves(ended, recipe, changes, redo_from, message):
    with pytest.raises(UserError) as caught, ended.claim(load_recipe(recipe, changes), redo_from):
        pass
    assert str(caught.value) == message
    assert len(ended.checkpoints("assistant").names()) == 3 and not (ended.root / "set-aside").exists()


def test_a_branch_takes_the_checkpoint_and_the_log_up_to_it_also_after_a_kill(ended, recipe):
    stage, changed = ended.stage("assistant"), load_recipe(recipe, ["stages.assistant.steps=15"])
    with ended.claim(changed, "assistant@8"):
        pass
    begun = ended.root / "stages" / ".assistant.branch"
    stage.root.rename(begun)  # as a process leaves it that dies before the last rename
    with ended.claim(changed, "assistant@8"):
        pass
    assert not begun.exists()
    assert ended.checkpoints("assistant").names() == ["step-000000008-0a1b2c3d"]
    assert [point.step for point in read_all_metrics(stage.heldout_metrics)] == [4, 8]
    aside = ended.root / "set-aside" / "001" / "stages" / "assistant"
    assert len(list((aside / "checkpoints").iterdir())) == 3
    with (
        pytest.raises(UserError, match=r"--from assistant@8: no stage has begun in .*new; leave it out"),
        Workdir(ended.root / "new").claim(changed, "assistant@8"),
    ):
        pass
