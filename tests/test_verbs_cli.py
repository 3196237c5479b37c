"""The command's own words: what it refuses, in one line, with exit code 2, and what it can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.orchestrator.cli import main


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


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(["--help"], ""), (["check", "RECIPE"], ""), (["check", "RECIPE"], "1")]
)
def test_output_that_nobody_reads_ends_quietly(arguments, unbuffered, tmp_path):
    """As `minilm … | head` does: 141, and no traceback."""
    source = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
    arguments = [str(source) if argument == "RECIPE" else argument for argument in arguments]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "minilm", *arguments],
        stdout=writes,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_pipe_elsewhere_is_no_reader_that_went_away(monkeypatch):
    def fail(options):
        raise BrokenPipeError("some socket")

    monkeypatch.setattr("minilm.orchestrator.verbs.check.check_recipes", fail)
    with pytest.raises(BrokenPipeError):
        main(["check", "a.yaml"])


def test_what_the_hub_says_is_said_once(tmp_path):
    """Its library prints by itself, and would again by way of the root logger."""
    program = (
        "from huggingface_hub.utils import logging; from minilm.orchestrator.cli import main; "
        f"main(['check', {str(tmp_path / 'none.yaml')!r}]); "
        "logging.get_logger('huggingface_hub.utils._http').warning('Retrying')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.count("Retrying") == 1


def test_check_says_everything_that_is_wrong_with_all_recipes(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("name: a\nstges: []\n")
    (tmp_path / "b.yaml").write_text("name: B!\n")
    assert main(["check", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("minilm: error: ") for line in errors)
    assert any("a.yaml:2: stges: unknown key; did you mean 'stages'?" in line for line in errors)
    assert any("b.yaml:1: name: given 'B!'" in line for line in errors)


def test_check_looks_at_the_configs_of_teachers_that_are_here(tmp_path, capsys, text, teacher):
    """And refuses what a run would refuse, with what is allowed; weights are not read."""
    from tests.test_driver_curriculum import write_recipe

    here = tmp_path / "teacher"
    shutil.copytree(teacher, here)
    (here / "model.safetensors").write_bytes(b"")
    recipe = str(write_recipe(tmp_path, text, here))
    assert main(["check", recipe, "--set", "stages.assistant.teacher_layer=3"]) == 0
    assert "sound; stages: assistant (40 steps), small (40 steps)" in capsys.readouterr().out
    assert main(["check", recipe, "--set", "stages.assistant.teacher_layer=99"]) == 2
    out, errors = capsys.readouterr()
    complaint = 'stage assistant: layer 99 does not exist; bert has layers 1 to 3, or "last"'
    assert errors == f"minilm: error: {recipe}: {complaint}\n" and "sound" not in out
    assert main(["check", recipe, "--set", "stages.small.student.hidden=25"]) == 2
    assert "stage small: student 'small': 4 heads do not divide hidden size 25" in capsys.readouterr().err


def test_the_librarys_recipes_are_sound(capsys):
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
    from tests.test_driver_curriculum import write_recipe

    (tmp_path / "file").touch()
    assert (
        main(["run", str(write_recipe(tmp_path, text, teacher)), "--workdir", str(tmp_path / "file" / "w")])
        == 2
    )
    assert "as work directory: Not a directory; give another --workdir" in capsys.readouterr().err


def test_a_finished_run_tells_the_tracker_what_it_could_not(tmp_path, monkeypatch, capsys, text, teacher):
    """The server was away when the run ended; the same command later tells it, once."""
    import json

    import minilm.orchestrator.tracking.tracking
    from minilm.orchestrator.recipe.load import load_recipe
    from tests.test_driver_curriculum import write_recipe
    from tests.test_driver_status_line import make_summary

    recipe_file = write_recipe(tmp_path, text, teacher)
    recipe, work = load_recipe(recipe_file), tmp_path / "work"
    work.mkdir()
    (work / "run.json").write_text(json.dumps({"recipe": recipe.result_fields()}))
    (work / "summary.json").write_text(json.dumps(make_summary("mlflow ui").to_json()))
    (work / "tracking.json").write_text(
        json.dumps({"key": "k", "runs": {}, "notes": [{"run": "", "name": "tiny"}]})
    )
    told = []
    monkeypatch.setattr(
        minilm.orchestrator.tracking.tracking, "flush_pending", lambda *given: told.append(given)
    )
    assert main(["run", str(recipe_file), "--workdir", str(work)]) == 0
    assert told == [(work.resolve(), "tiny")]
    (work / "tracking.json").write_text(json.dumps({"key": "k", "runs": {}, "notes": []}))
    assert main(["run", str(recipe_file), "--workdir", str(work)]) == 0
    assert len(told) == 1
