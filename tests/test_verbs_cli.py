"""The command's own words: what it refuses, in one line, with exit code 2, and what it can do."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minilm.orchestrator.cli import main, parser
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.verbs.arguments import Parser
from tests.data_cases import make_tokenizer


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"    {verb} " in out for verb in ("run", "check", "data", "bench", "pull", "promote"))


def test_a_path_that_no_file_can_have_is_told(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {'a' * 300}.yaml\n")
    assert main(["check", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilm: error: given the path ") and line.endswith(
        "; allowed: 255 bytes a name and 4095 in all"
    )


def test_a_place_that_takes_no_files_is_told(tmp_path, capsys, monkeypatch):
    text, tokenizer = tmp_path / "a.txt", make_tokenizer(tmp_path / "t")
    text.write_text("a book of the house\n" * 50)
    build = ["data", "build", "-q", str(text), "--tokenizer", tokenizer, "--out"]
    for out in ("/proc", "/proc/x", "/proc/x/deeper"):
        assert main([*build, out]) == 2
        expected = f"'{out}' cannot be written (it takes no file, as /proc); choose another folder"
        assert capsys.readouterr().err == f"minilm: error: {expected}\n"
    register = ["register", str(tmp_path), "mine", "--workdir", "/proc/x"]
    for command in (["data", "convert", str(tmp_path), "/proc/x"], register):
        assert main(command) == 2
        expected = (
            "/proc/x can't be written: /proc takes no folder (No such file or directory); give another place"
        )
        assert capsys.readouterr().err == f"minilm: error: {expected}\n"

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device", str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
    expected = f"no space left on the disk at {tmp_path}; free some and run the same command again"
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"


def leaves(of: Parser) -> list[Parser]:
    """Every verb that does something."""
    groups = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for verb in group.choices.values() for leaf in leaves(verb)] or [of]


def examples(verb: Parser) -> list[str]:
    return [line.strip() for line in (verb.epilog or "").splitlines()[1:]]


@pytest.mark.parametrize("verb", leaves(parser()), ids=lambda verb: verb.prog)
def test_every_verbs_help_has_examples_that_can_be_typed(verb):
    assert verb.epilog.startswith("examples:\n") and examples(verb)
    for example in examples(verb):
        words = shlex.split(example.removeprefix('eval "$(').replace(')"', ""), comments=True)
        words = words[words.index("minilm") + 1 :]
        words = words[: words.index(">")] if ">" in words else words
        assert parser().parse_args(words).parser.prog == verb.prog


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(
        r"minilm (\d+\.\d+\S*|\(not installed\))( \(commit \w{40}(\+changes)?\))?\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["chek", "a.yaml"], "argument VERB: given 'chek'; did you mean check?; allowed: run, check, "),
        (["zzzz"], "argument VERB: given 'zzzz'; allowed: run, "),
        (["data", "bild"], "argument VERB: given 'bild'; did you mean build?; allowed: build, import, "),
        (
            ["run", "a.yaml", "--launcher", "inlin"],
            "given 'inlin'; did you mean inline?; allowed: ray, inline",
        ),
        (
            ["run", "a.yaml", "--wrkdir=x"],
            "minilm run: error: given --wrkdir=x, which minilm run does not take; did you mean --workdir?; "
            "see minilm run --help",
        ),
        (
            ["check", "a.yaml", "--zzz"],
            "minilm check: error: given --zzz, which minilm check does not take; see minilm check --help",
        ),
        (
            ["-q", "--zzz", "check", "a.yaml"],
            "minilm check: error: given -q before the verb; write it behind: minilm check -q",
        ),
    ],
)
def test_a_mistyped_word_is_guessed(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_the_log_is_shown_on_request_and_the_traceback_of_a_refusal_too(tmp_path, capsys):
    absent = str(tmp_path / "absent.yaml")
    assert main(["check", absent, "-q"]) == main(["check", absent, "-v"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert logging.getLogger("minilm").level == logging.INFO
    assert main(["check", absent, "-vv"]) == 2
    assert "Traceback" in capsys.readouterr().err
    main(["check", absent])
    assert logging.getLogger("minilm").level == logging.NOTSET


def test_list_has_a_row_for_each_packaged_recipe(capsys):
    folder = Path(__file__).resolve().parent.parent / "recipes"
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {path.stem for path in folder.glob("*.yaml")}
    assert all(row["purpose"] and row["teacher"] for row in rows.values())
    two = rows["bert-l6-h384-ta"]
    assert two["teacher"] == "google-bert/bert-base-uncased"
    shapes = [(s["stage"], s["layers"], s["hidden"], s["steps"]) for s in two["students"]]
    assert shapes == [("assistant", 12, 384, 400_000), ("student", 6, 384, 400_000)]
    assert main(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bert-l6-h384-ta ")]
    for part in (
        "12 x 384, then 6 x 384",
        "google-bert/bert-base-uncased",
        "800,000",
        "teaches the student (6",
    ):
        assert part in line


def test_check_as_json_is_an_object_a_recipe(tmp_path, capsys):
    good = Path(__file__).resolve().parent.parent / "recipes" / "bert-l6-h384.yaml"
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\nstges: []\n")
    assert main(["check", "--json", str(good)]) == 0
    (sound,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (sound["recipe"], sound["sound"], sound["problems"]) == (str(good), True, [])
    assert sound["stages"] == [{"name": "student", "steps": 400_000}]
    assert any("data.text" in note for note in sound["not_here"])
    assert main(["check", "--json", str(bad), str(good)]) == 2
    out, errors = capsys.readouterr()
    first, second, end = map(json.loads, out.splitlines())
    assert first["sound"] is False and second["sound"] is True
    assert any("stges: unknown key" in problem for problem in first["problems"])
    assert (end["event"], end["exit_code"], end["problems"]) == ("error", 2, first["problems"])
    assert errors.count("minilm: error: ") == len(first["problems"])


def test_run_as_json_is_an_event_a_line(tmp_path, capsys, text, teacher):
    from tests.test_driver_curriculum import write_recipe

    few = [word for stage in ("assistant", "small") for word in ("--set", f"stages.{stage}.steps=5")]
    recipe = str(write_recipe(tmp_path, text, teacher))
    command = ["run", recipe, "--json", "--launcher", "inline", "--workdir", str(tmp_path / "work"), *few]
    assert main(command) == 0
    whole = load_recipe(tmp_path / "work" / "whole-recipe.yaml")
    assert whole.result_fields() == load_recipe(recipe, few[1::2]).result_fields()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"event", "time", "text"} <= set(event) for event in events)
    built = [event for event in events if event["event"] == "built"]
    assert len(built) == 1 and built[0]["report"]["documents"] == 120
    assert {event.get("stage") for event in events} == {None, "assistant", "small"}
    assert {"building", "publishing"} <= {event.get("doing") for event in events}
    learned = {event["stage"]: event for event in events if event["event"] == "learned"}
    for model in events[-1]["models"][1:]:
        stage = learned[model["name"]]
        gain = stage["students"][model["name"]]
        assert gain["after"] == pytest.approx(sum(model["after"].values()))
        before, after = sum(model["before"].values()), gain["after"]
        said = f"5 steps: held-out divergence {before:.3f} → {after:.3f} ({after / before:.0%} of the start)"
        assert stage["text"].endswith(f"] {model['name']}  {said}")
    assert events[-1]["event"] == "result"
    assert [model["name"] for model in events[-1]["models"]][1:] == ["assistant", "small"]
    assert main(command) == 0
    again = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert again == ["message", "result"]
    assert main([*command, "--set", "stages.small.peak_lr=-1"]) == 2
    (end,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (end["event"], end["exit_code"]) == ("error", 2)
    assert "peak_lr" in end["problems"][0]


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
    """And refuses what a run would refuse, with what is allowed."""
    from tests.test_driver_curriculum import write_recipe

    here = tmp_path / "teacher"
    shutil.copytree(teacher, here)
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
    assert capsys.readouterr().out.count(": sound; stages: ") == len(recipes) > 12


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
