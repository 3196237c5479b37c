"""A changed recipe in a work directory: what it invalidates, in which words, and `--from STAGE`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minilm.orchestrator import cli
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.changes import invalidated_stages, text_changed
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.system.files import read_json, write_json
from tests.support import NO_DATA

STAGE = {"batch": 8, "steps": 6, "peak_lr": 1e-3, "warmup_steps": 2, "held_out_rows": 8}


def write_recipe(folder: Path, teacher: Path | str, data: dict[str, object]) -> Path:
    """teacher → wide → thin, and beside them other, taught by the teacher itself."""
    stages = [
        {"name": "wide", "teacher": str(teacher), "student": {"layers": 2, "hidden": 24}, **STAGE},
        {"name": "thin", "teacher": "wide", "student": {"layers": 1, "hidden": 24}, **STAGE},
        {"name": "other", "teacher": str(teacher), "student": {"layers": 1, "hidden": 24}, **STAGE},
    ]
    compute = {"micro_batch": 4, "threads": 1, "device": "cpu"}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "data": data, "stages": stages, "compute": compute}))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, "owner/teacher", {"text": "a.txt", "tokenizer": "owner/teacher"})


def record(recipe: Recipe, *fingerprints: str) -> dict[str, object]:
    return {"recipe": recipe.result_fields(), "data": [["books", f] for f in fingerprints]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {}),
        (["compute.workers=2", "tracking.log_every=3", "stages.wide.eval_every=2"], {}),
        (["stages.thin.steps=9"], {"thin": "stages.thin.steps is 6 there and 9 now"}),
        (["stages.thin.student.dropout=0"],
         {"thin": "stages.thin.students.0.dropout is 0.1 there and 0.0 now"}),
        (["stages.wide.peak_lr=0.5"],
         {"wide": "stages.wide.peak_lr is 0.001 there and 0.5 now", "thin": "its teacher wide comes from stage wide"}),
        (["seed=1"], dict.fromkeys(("wide", "thin", "other"), "seed is 0 there and 1 now")),
        (["data.seq_len=64", "compute.precision=float32"],
         dict.fromkeys(("wide", "thin", "other"),
                       "data.seq_len is 512 there and 64 now; compute.precision is 'auto' there and 'float32' now")),
    ],
)  # fmt: skip
def test_what_a_change_invalidates(recipe_file, changes, expected):
    old = load_recipe(recipe_file)
    assert invalidated_stages(record(old), record(load_recipe(recipe_file, changes))) == expected


def test_replaced_data_and_stages_that_come_and_go(recipe_file):
    recipe = load_recipe(recipe_file)
    one, two = record(recipe, "a" * 64), record(recipe, "b" * 64)
    assert set(invalidated_stages(one, two)) == {"wide", "thin", "other"}
    assert "data set books was replaced: its fingerprint was aaaaaaaaaaaa…, is bbbbbbbbbbbb… now" in str(
        invalidated_stages(one, two)
    )
    assert invalidated_stages(one, {"recipe": recipe.result_fields()}) == {}
    fewer = load_recipe(recipe_file)
    fields = fewer.result_fields()
    fields["stages"] = [fields["stages"][2], fields["stages"][0]]
    assert invalidated_stages(one, {"recipe": fields}) == {}
    assert invalidated_stages({"recipe": fields}, one) == {"thin": "stage thin is new in the recipe"}


def test_which_change_builds_the_data_again(recipe_file):
    def changed(*overrides: str) -> bool:
        return text_changed(record(load_recipe(recipe_file)), record(load_recipe(recipe_file, overrides)))

    assert not changed("data.window=3", "stages.wide.steps=9")
    assert changed("data.held_out=0.2") and changed("seed=3")


@pytest.fixture
def work(recipe_file: Path, tmp_path: Path) -> Workdir:
    """A directory in which wide is done and thin has a checkpoint; other has not begun."""
    work = Workdir(tmp_path / "work")
    write_json(work.run, record(load_recipe(recipe_file), "a" * 64))
    for file in (
        "stages/wide/done.json",
        "stages/thin/checkpoints/step-000000003/checkpoint.json",
        "data/x.json",
    ):
        (work.root / file).parent.mkdir(parents=True, exist_ok=True)
        write_json(work.root / file, {})
    return work


@pytest.mark.parametrize(
    ("changes", "redo_from", "message"),
    [
        (["stages.thin.steps=9"], None,
         "holds work of stage thin that this recipe changes: stages.thin.steps is 6 there and 9 now; --from thin does "
         "it again, with all stages behind it (what is there goes to set-aside/), or give another --workdir"),
        (["seed=4"], None, "holds work of stages wide, thin that this recipe changes: seed is 0 there and 4 now; "
                           "--from wide does it again"),
        (["stages.wide.steps=9"], "thin",
         "--from thin keeps stage wide, which this recipe changes: stages.wide.steps is 6 there and 9 now; give "
         "--from wide, or another --workdir"),
        ([], "slim", "--from slim: the recipe has no such stage; allowed: wide, thin, other"),
        (["name=else"], "wide", "belongs to another recipe: name is 'r' there and 'else' now; give another --workdir"),
    ],
)  # fmt: skip
def test_work_that_would_be_lost_is_told_and_nothing_moves(work, recipe_file, changes, redo_from, message):
    recipe = load_recipe(recipe_file, changes)
    with pytest.raises(UserError) as caught, work.claim(recipe, redo_from):
        pass
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert work.begun("wide") and work.begun("thin") and work.data.exists()
    assert not (work.root / "set-aside").exists()


def test_a_change_of_what_has_not_begun_is_taken(work, recipe_file):
    """The points of an attempt that came to no checkpoint are another recipe's, too."""
    write_json(work.stage("other").root / "metrics.jsonl", {})
    with work.claim(load_recipe(recipe_file)):
        assert not (work.root / "set-aside").exists()
    with work.claim(load_recipe(recipe_file, ["stages.other.steps=9"])):
        assert work.begun("thin") and not work.stage("other").root.exists()
        assert (work.root / "set-aside" / "001" / "stages" / "other" / "metrics.jsonl").exists()


def test_checkpoints_elsewhere_are_work_too_and_set_aside_there(work, recipe_file, tmp_path):
    there = tmp_path / "elsewhere" / "r" / "other"
    there.joinpath("step-000000003").mkdir(parents=True)
    write_json(there / "step-000000003" / "checkpoint.json", {})
    write_json(work.stage("other").spec, {"checkpoints": str(there)})
    changed = load_recipe(recipe_file, ["stages.other.steps=9"])
    with pytest.raises(UserError, match="holds work of stage other"), work.claim(changed):
        pass
    with work.claim(changed, "other"):
        assert not work.begun("other") and work.begun("thin")
    assert [path.name for path in there.iterdir()] != ["step-000000003"]


def test_from_sets_aside_once_and_then_goes_on(work, recipe_file, capsys):
    recipe = load_recipe(recipe_file, ["stages.thin.steps=9"])
    with work.claim(recipe, "thin"):
        aside = work.root / "set-aside" / "001"
        assert (aside / "stages" / "thin" / "checkpoints").exists() and not work.stage("thin").root.exists()
        assert work.begun("wide") and work.data.exists()
        assert f"set aside in {aside}: stages/thin\n" in capsys.readouterr().err
        write_json(work.run, record(recipe, "a" * 64) | {"from": "thin"})  # as `adopt` does
        write_json(work.stage("thin").done, {})
    for again in ("thin", None):  # the same command, or the plain one, after a kill
        with work.claim(recipe, again):
            assert work.begun("thin")
    write_json(work.summary, {})
    with work.claim(recipe, "thin"):  # it had ended: once more
        assert not work.stage("thin").root.exists() and not work.summary.exists()
    assert sorted(path.name for path in (work.root / "set-aside").iterdir()) == ["001", "002"]


def test_from_of_an_earlier_recipe_is_not_gone_on_with(work, recipe_file):
    """`--from thin` came to its end long ago; then the recipe changed, and was stopped before its end."""
    write_json(work.run, record(load_recipe(recipe_file), "a" * 64) | {"from": "thin"})
    changed = load_recipe(recipe_file, ["stages.other.steps=9"])
    work.adopt(changed, recipe_file, NO_DATA)
    with work.claim(changed, "thin"):
        assert not work.begun("thin") and work.begun("wide")


def test_data_of_another_text_are_set_aside(work, recipe_file):
    with work.claim(load_recipe(recipe_file, ["data.seq_len=64"]), "wide"):
        assert not work.data.exists()
        assert (work.root / "set-aside" / "001" / "stages" / "wide" / "done.json").exists()
        assert (work.root / "set-aside" / "002" / "data" / "x.json").exists()


def test_a_stage_is_done_again_from_the_command_line(shards, teacher, tmp_path, capsys, caplog):
    """Another number of steps for thin: wide stays, thin and other are made again and get new versions."""
    path = write_recipe(tmp_path, teacher, {"shards": str(shards)})
    run = ["run", str(path), "--workdir", str(tmp_path / "work"), "--launcher", "inline"]
    assert cli.main(run) == 0
    work = Workdir(tmp_path / "work")
    wide = (work.stage("wide").published).stat().st_mtime_ns
    changed = [*run, "--set", "stages.thin.steps=4"]
    capsys.readouterr()
    assert cli.main(changed) == 2
    assert "stages.thin.steps is 6 there and 4 now; --from thin does it again" in capsys.readouterr().err
    assert cli.main([*changed, "--from", "thin"]) == 0
    out = capsys.readouterr().out
    assert "r-wide v1" in out and "r-thin v2" in out and "r-other v2" in out
    assert work.stage("wide").published.stat().st_mtime_ns == wide
    done = [read_json(folder / "stages" / "thin" / "done.json") for folder in
            (work.root, work.root / "set-aside" / "001")]  # fmt: skip
    assert [record["steps"] for record in done if record] == [4, 6]
    assert "points of stage" not in caplog.text  # gone because that was asked for

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work.root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("r").experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["other", "other", "r", "thin", "thin", "wide"]
    assert cli.main(changed) == 0 and "is done already" in capsys.readouterr().err
