"""The command's own words: what it refuses, in one line, with exit code 2, and what it can do."""

from __future__ import annotations

import pytest

from orchestrator.cli import main


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"    {verb} " in out for verb in ("run", "check", "data", "bench", "pull", "promote"))


@pytest.mark.parametrize("group", ["data", "bench"])
def test_a_group_without_a_verb_is_refused(group, capsys):
    with pytest.raises(SystemExit) as ended:
        main([group])
    assert ended.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_check_says_everything_that_is_wrong_with_all_recipes(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("name: a\nstges: []\n")
    (tmp_path / "b.yaml").write_text("name: B!\n")
    assert main(["check", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("minilm: error: ") for line in errors)
    assert any("a.yaml:2: stges: unknown key; did you mean 'stages'?" in line for line in errors)
    assert any("b.yaml:1: name: given 'B!'" in line for line in errors)


def test_the_librarys_recipes_are_sound(capsys):
    from pathlib import Path

    recipes = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
    assert main(["check", *map(str, recipes)]) == 0
    assert capsys.readouterr().out.count(": sound; stages: ") == len(recipes) == 13


def test_run_without_the_recipe_file(tmp_path, capsys):
    assert main(["run", str(tmp_path / "absent.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilm: error: ")
    assert "absent.yaml" in error
    assert error.count("\n") == 1


def test_pull_needs_to_know_which_registry(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["pull", "models:/a@newest", str(tmp_path / "out")]) == 2
    assert "set MLFLOW_TRACKING_URI to the registry, or give --workdir DIR" in capsys.readouterr().err


def test_a_work_directory_that_cannot_be_made(tmp_path, capsys, text, teacher):
    from test_curriculum import write_recipe

    (tmp_path / "file").touch()
    assert (
        main(["run", str(write_recipe(tmp_path, text, teacher)), "--workdir", str(tmp_path / "file" / "w")])
        == 2
    )
    assert "as work directory: Not a directory; give another --workdir" in capsys.readouterr().err


def test_a_finished_run_tells_the_tracker_what_it_could_not(tmp_path, monkeypatch, capsys, text, teacher):
    """The server was away when the run ended; the same command later tells it, once."""
    import json

    from test_curriculum import write_recipe
    from test_progress import make_summary

    import orchestrator.tracking
    from orchestrator.recipe import load_recipe

    recipe_file = write_recipe(tmp_path, text, teacher)
    recipe, work = load_recipe(recipe_file), tmp_path / "work"
    work.mkdir()
    (work / "run.json").write_text(json.dumps({"recipe": recipe.result_fields()}))
    (work / "summary.json").write_text(json.dumps(make_summary("mlflow ui").to_json()))
    (work / "tracking.json").write_text(
        json.dumps({"key": "k", "runs": {}, "notes": [{"run": "", "name": "tiny"}]})
    )
    told = []
    monkeypatch.setattr(orchestrator.tracking, "tell_rest", lambda *given: told.append(given))
    assert main(["run", str(recipe_file), "--workdir", str(work)]) == 0
    assert told == [(work.resolve(), "tiny")]
    (work / "tracking.json").write_text(json.dumps({"key": "k", "runs": {}, "notes": []}))
    assert main(["run", str(recipe_file), "--workdir", str(work)]) == 0
    assert len(told) == 1
