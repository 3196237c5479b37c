"""`minilm new`: what it proposes has the plan's own figures, and what it writes passes `check` and runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from minilm.orchestrator.bench import stage_rate
from minilm.orchestrator.cli import main
from minilm.orchestrator.plan.advice import weights_in_layers
from minilm.orchestrator.plan.draft import Draft
from minilm.orchestrator.plan.propose import Proposal, rounded_up
from minilm.orchestrator.plan.wish import budget_of
from minilm.orchestrator.recipe.library import said_in_head
from minilm.orchestrator.recipe.load import load_recipe
from tests.conftest import make_embedder, make_teacher


@pytest.fixture(scope="module")
def home(tmp_path_factory, text) -> Path:
    """A user's folder: an encoder of 2 x 128 with 4 heads, an embedder, a text."""
    folder = tmp_path_factory.mktemp("home")
    make_teacher(folder / "encoder", layers=2, hidden=128)
    make_embedder(make_teacher(folder / "embedder"))
    shutil.copy(text, folder / "words.txt")
    return folder


@pytest.fixture(autouse=True)
def there(home, monkeypatch, tmp_path):
    """The recipes of each test lie in a folder of their own."""
    monkeypatch.chdir(home)
    return tmp_path


GIVEN = {"teacher": "encoder", "text": "words.txt", "use": "fine-tuning", "target": "1M", "hardware": "h100",
         "budget": "1h"}  # fmt: skip


def new(out: Path, *more: str, **changes: str | None) -> int:
    given = {flag: value for flag, value in (GIVEN | changes).items() if value is not None}
    return main(["new", str(out), *(f"--{flag}={value}" for flag, value in given.items()), *more])


def proposed(out: str) -> list[list[str]]:
    """The cells of the table, a list a proposal."""
    lines = out.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("-  --"))
    rows = lines[rule + 1 : lines.index("", rule)]
    return [[cell.strip() for cell in row.split("  ") if cell] for row in rows]


def test_what_is_written_is_sound_and_costs_what_was_said(there, capsys):
    out = there / "My Recipe.yaml"
    assert new(out, "--shape", "1x64") == 0
    printed = capsys.readouterr().out
    assert "teacher   " in printed and "bert, 2 x 128, 4 heads, 61 tokens, rows of at most 64" in printed
    by_shape = {row[1].replace(" ", ""): row for row in proposed(printed)}
    assert set(by_shape) == {"1x128", "2x64", "1x64"}
    assert next(iter(by_shape)) == "1x128"
    recipe = load_recipe(out)
    assert recipe.name == "my-recipe"
    assert [(s.name, s.students[0].layers, s.students[0].hidden) for s in recipe.stages] == [
        ("student-assistant", 2, 64), ("student", 1, 64),
    ]  # fmt: skip
    assert main(["check", str(out)]) == 0
    assert f"{out}: sound" in capsys.readouterr().out
    assert main(["plan", str(out), "--hardware", "h100", "--json"]) == 0
    *stages, whole = map(json.loads, capsys.readouterr().out.splitlines())
    row = by_shape["1x64"]
    assert row[2] == f"{stages[-1]['work']['students'][0]['parameters'] / 1e6:.1f} M"
    assert row[5] == f"{whole['flops']:.2e}" and whole["seconds"] <= 3600
    text = out.read_text()
    said = "teaches a student of 1 x 64 by an assistant of 2 x 64: 0.1 M parameters."
    assert said_in_head(text, "Purpose").endswith(said)
    for part in (
        "# Command:  minilm run ",
        "# Hours:    about ",
        "computed",
        "# Others:   ",
        "# Source:   MiniLM",
    ):
        assert part in text


def test_students_of_the_teachers_layers_stand_first():
    """As the quickstart's did, whose narrow student that started at random was worth no more than random weights."""
    order = [
        ("the largest that has enough steps", "teacher-layers", 4, 384, 200, 0),
        ("a smaller one", "teacher-layers", 2, 384, 999, 0),
        ("a narrow one with enough tokens", "teacher-pca", 12, 192, 999, 20),
        ("of the teacher's layers, with few steps", "teacher-layers", 3, 384, 199, 19),
        ("a narrow one with too few tokens", "teacher-pca", 2, 192, 999, 19),
        ("with fewer", "random", 2, 192, 999, 1),
    ]
    found = []
    for name, init, layers, hidden, steps, tokens in order:
        weights = weights_in_layers(layers, hidden, 4 * hidden)
        draft = Draft(layers, hidden, init, steps=steps, why=name)
        found.append(Proposal(draft, (), 0, weights, tokens * weights, 0.0, None))
    best = sorted(reversed(found), key=lambda one: one.rank("fine-tuning"), reverse=True)
    assert [one.draft.why for one in best] == [name for name, *_ in order]


def test_an_embedder_learns_relations_and_then_vectors(there, capsys):
    a = there / "new" / "folder" / "a.yaml"
    assert new(a, use="embeddings", teacher="./embedder") == 0
    relations, vectors = load_recipe(a).stages
    assert (relations.objective, vectors.objective) == ("minilm", "embedding")
    assert vectors.students[0].init == relations.students[0].name and vectors.embedding is None
    assert new(there / "b.yaml", use="embeddings") == 0  # a teacher without modules.json
    assert load_recipe(there / "b.yaml").stages[-1].embedding.pooling == "mean"
    assert main(["check", str(a), str(there / "b.yaml")]) == 0
    assert "sound" in capsys.readouterr().out


def test_more_devices_and_longer_budgets_are_used(there, capsys):
    assert new(there / "a.yaml", hardware="a100x3", budget="30d") == 0
    assert new(there / "b.yaml", hardware="h100x256", budget="2s") == 0
    a, b = (load_recipe(there / f"{name}.yaml") for name in "ab")
    assert (a.compute.workers, b.compute.workers) == ((3, 3), (256, 256))
    assert b.stages[-1].steps < a.stages[-1].steps and b.stages[-1].batch == 256
    assert "40 passes over the text" in (there / "a.yaml").read_text()
    assert main(["check", str(there / "a.yaml"), str(there / "b.yaml")]) == 0


@pytest.mark.slow
def test_this_machine_is_measured(there, monkeypatch, capsys):
    monkeypatch.setattr(stage_rate, "SECONDS", 0.01)
    assert new(there / "a.yaml", hardware="here", target="60s", budget="3m") == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s, measured on this machine's cpu" in printed and "ms a text" in printed
    assert (
        "what the budget of 3m allows" in (there / "a.yaml").read_text()
        or "40 passes" in printed + (there / "a.yaml").read_text()
    )
    assert new(there / "b.yaml", hardware="here", target="0.001ms") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "minilm: error: --target: given 0.001ms; the smallest student of this teacher, 1 x 64, takes "
    )
    assert not (there / "b.yaml").exists()


WRONG = {
    "teacher missing": ({"teacher": "./nowhere"}, "--teacher: given './nowhere', which is not there; allowed: a model's"
                        " folder in the format of transformers, package:IMPORT_NAME/FOLDER or a hub id OWNER/NAME"),
    "no config": ({"teacher": "."}, "--teacher: given '.', which has no config.json; allowed: a model's folder"),
    "no package": ({"teacher": "package:nobody/model"}, "--teacher: given 'package:nobody/model', but no package "
                   "'nobody' is installed in this Python"),
    "no tokenizer": ({"teacher": "./bare"}, "--teacher: tokenizer "),
    "registry": ({"teacher": "models:/a@b"}, "--teacher: given 'models:/a@b', and a model in a registry can't be looked"
                 " at; bring it here (minilm pull models:/a@b FOLDER) and give the folder"),
    "no form": ({"teacher": "a b"}, "--teacher: given 'a b'; allowed: "),
    "away": ({"teacher": "nobody/nothing"}, "--teacher: cannot read the config of nobody/nothing ("),
    "text missing": ({"text": "none/*.txt"}, "--text: given 'none/*.txt', but there is no such file, or none that "
                     "matches; allowed: files, folders, globs or package:IMPORT_NAME/FILE"),
    "text of a variable": ({"text": "${x}.txt"}, "--text: given '${x}.txt', and ${ begins a variable in a recipe; "
                           "give a path without it"),
    "text empty": ({"text": "empty.txt"}, "--text: no text in "),
    "text short": ({"text": "short.txt"}, "--text: the "),
    "use": ({"use": "chat"}, "--use: given 'chat'; allowed: fine-tuning or embeddings"),
    "no size": ({"target": "small"}, "--target: given 'small'; allowed: the student's most parameters, as 22M, or its "
                "most milliseconds for a text, as 10ms"),
    "size 0": ({"target": "0M"}, "--target: given '0M'; allowed: "),
    "too small": ({"target": "0.1k"}, "--target: given 0.1k; the smallest student of this teacher, 1 x 64, has 0.0624 M"
                  " parameters, 0.0039 M of them its table of tokens; allowed: that or more, or a teacher with a "
                  "smaller vocabulary (minilm shrink)"),
    "hardware": ({"hardware": "abacus"}, "--hardware: given 'abacus'; allowed: here (this machine, measured), h200, "),
    "too many": ({"hardware": "h100x257"}, "--hardware: given 'h100x257'; a step of 256 rows has work for 256 devices"),
    "budget": ({"budget": "soon"}, "--budget: given 'soon'; allowed: a time of training, as 90m, 24h or 3d"),
    "budget of a number": ({"budget": "1h30"}, "--budget: given '1h30'; allowed: "),
    "budget 0": ({"budget": "0h"}, "--budget: given '0h'; allowed: "),
    "too short": ({"budget": "0.0001s"}, "--budget: given 0.0001s; the student that is trained soonest takes 1s for "
                  "20 steps a stage; allowed: that or more, or faster hardware"),
    "one flag": ({"use": None}, "--use: not given, and there is no terminal to ask at; see minilm new --help"),
    "two flags": ({"text": None, "budget": None}, "--text, --budget: not given, and there is no terminal"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_can_not_be_is_one_line_and_nothing_is_written(case, there, home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123 (pytest closes it)
    (home / "bare").mkdir(exist_ok=True)
    shutil.copy(home / "encoder" / "config.json", home / "bare")
    (home / "empty.txt").write_text("\n")
    (home / "${x}.txt").write_text("time year\n")
    (home / "short.txt").write_text("time year\n\nday man\n")
    changes, expected = WRONG[case]
    assert new(there / "mine.yaml", **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minilm: error: {expected}")
    assert not list(there.iterdir())


@pytest.mark.parametrize("seconds", [0.2, 59.7, 1381, 3599.2, 3690, 300_000])
def test_a_budget_that_is_asked_for_is_enough(seconds):
    told = rounded_up(seconds)
    assert seconds <= budget_of(told).seconds < seconds + 60, told


def test_a_closed_standard_input_is_no_terminal(there, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert new(there / "mine.yaml", use=None) == 2
    assert "--use: not given, and there is no terminal to ask at" in capsys.readouterr().err


def test_nothing_is_replaced_and_names_are_looked_at(there, capsys):
    (there / "mine.yaml").write_text("mine\n")
    (there / "dangling.yaml").symlink_to(there / "nowhere")
    assert [new(there / name) for name in ("mine.yaml", "dangling.yaml", "mine", "mine.txt")] == [2] * 4
    assert (there / "mine.yaml").read_text() == "mine\n"
    assert new(there / "a.yaml", "--shape", "9x9") == 2
    (there / "file").write_text("")
    assert new(there / "file" / "a.yaml") == 2
    lines = [line.removeprefix("minilm: error: ") for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == f"{there}/mine.yaml is there already and stays as it is; give another name"
    assert lines[2] == f"given '{there}/mine'; allowed: the name of a new file that ends in .yaml"
    assert lines[4].startswith("--shape: given '9x9'; allowed here: ")
    assert lines[5] == f"given '{there}/file/a.yaml', but {there}/file is no folder; give another name"


def test_a_terminal_is_asked_for_what_is_missing(there, monkeypatch, capsys):
    """Answers that can't be read are asked again; the last question is which of the proposals."""
    typed = ["nowhere/at/all", "encoder", "words.txt", "fine-tuning", "1M", "h100", "h100 1h", "7", "2"]
    terminal, screen = os.openpty()
    os.write(terminal, "".join(f"{line}\n" for line in typed).encode())
    with open(screen, closefd=True) as keyboard:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr("sys.stdin", keyboard)
        assert main(["new", str(there / "mine.yaml")]) == 0
        printed = capsys.readouterr().out
        assert printed.count("Teacher: ") == 2 and "which is not there" in printed
        assert printed.count("Hardware and time of training") == 2 and "allowed: 2 words" in printed
        assert "given '7'; allowed: 1 to 3" in printed
        second = proposed(printed)[1][1]
        assert (
            f"{there / 'mine.yaml'} is yours, for a student of {second}; look at it with: minilm check"
            in printed
        )
        os.write(terminal, b"\x04")
        assert main(["new", str(there / "other.yaml")]) == 2
        assert "--teacher: not given; nothing is written" in capsys.readouterr().err
    os.close(terminal)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["fine-tuning", "embeddings"])
def test_what_is_written_runs(use, there, capsys):
    assert new(there / "a.yaml", "--shape", "1x64", use=use, budget="8s") == 0
    command = ["run", str(there / "a.yaml"), "--launcher", "inline", "--workdir", str(there / "work"), "-q"]
    assert main(command) == 0
    models = json.loads((there / "work" / "summary.json").read_text())["models"]
    assert models[-1]["registered"]
