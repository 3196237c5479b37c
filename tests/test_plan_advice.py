"""Warnings of `check` and `plan`: each for what it is about, and none for the papers' own settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.orchestrator.cli import main
from minilm.orchestrator.plan.advice import advice
from minilm.orchestrator.plan.reading import Corpus, Reading
from minilm.orchestrator.recipe.library import LIBRARY
from minilm.orchestrator.recipe.load import load_recipe
from tests.test_driver_curriculum import write_recipe

ASSISTED = LIBRARY / "bert-l6-h384-ta.yaml"


def warnings(*overrides: str, file: Path = ASSISTED, seq_len: int | None = 512) -> list[str]:
    return advice(load_recipe(file, overrides), seq_len=seq_len)


@pytest.mark.parametrize("file", sorted(LIBRARY.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_are_warned_of_nothing_but_a_missing_assistant(file):
    recipe = load_recipe(file)
    if recipe.name == "quickstart":
        assert [line.partition(" sees ")[0] for line in advice(recipe, seq_len=128)] == [
            "stage tiny: student tiny (3 x 192)",
        ], "not of the student that starts from the teacher's layers"
        return
    found = advice(recipe, seq_len=recipe.data.seq_len)
    if recipe.name.startswith("embed-"):  # of relations from a random start, never of a stage of vectors
        starts = [line.partition(": student start ")[0] for line in found]
        assert starts == [
            f"stage {stage.name}" for stage in recipe.stages if stage.students[0].init == "random"
        ]
        return
    assert all("no assistant, which the papers' rule asks for" in line for line in found)
    small = (3, 4, 6, 12) if "large" in recipe.name else (3, 4, 6)  # at most half of the teacher's layers
    student = recipe.stages[0].students[0]
    assert len(found) == (len(recipe.stages) == 1 and student.layers in small and student.hidden == 384)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["stages.student.peak_lr=0.03"],
            "stage student: peak_lr 0.03 is 100 times what a batch of 256 rows suggests (0.0003; the papers have "
            "3e-4 at 256 rows, 6e-4 at 2,048)",
        ),
        (
            ["stages.student.peak_lr=1e-5", "stages.student.batch=2048"],
            "stage student: peak_lr 1e-05 is 1/85 of what a batch of 2,048 rows suggests (0.0008; the papers have 3e-4 "
            "at 256 rows, 6e-4 at 2,048)",
        ),
        (
            ["stages.student.steps=100", "stages.student.warmup_steps=1"],
            "stage student: student student (6 x 384) sees 13.1 M tokens for 10.6 M weights in its layers, 1.2 for "
            "each; fewer than 20 are far too few (the papers have 2,000 and more): more steps, a "
            "smaller student, or one of the teacher's width with init: teacher-layers",
        ),
        (
            ["stages.student.student.layers=12"],
            "stage student: student student (12 x 384) is no smaller than its teacher (12 x 384)",
        ),
        (
            ["stages.student.student={layers: 2, hidden: 96, heads: 12}"],
            "stage student: student student has heads of 8 dimensions (hidden 96, 12 heads); the papers' have 32 and "
            "64: a larger hidden, or fewer heads with relation_heads in the stage",
        ),
        (
            ["stages.student.student={layers: 6, hidden: 192, heads: 12}"],
            "stage student: student student has at most half of the layers and of the hidden size of its teacher "
            "(12 x 384), and no assistant, which the papers' rule asks for; assistant: auto in the stage makes it",
        ),
        (
            ["stages.student.student.layers=8"],
            "stage student: its teacher assistant (12 x 384) is an assistant between 12 x 768 and 8 x 384, for which "
            "the papers' rule asks for none (at most 6 layers and hidden 384); it costs a stage",
        ),
    ],
    ids=["fast", "slow", "tokens", "no smaller", "heads", "no assistant", "assistant for none"],
)
def test_a_warning_with_its_figure(overrides, expected):
    assert expected in warnings(*overrides)
    assert not any(expected in line for line in warnings())


def test_advice_for_a_stage_of_vectors_names_no_key_that_it_refuses():
    narrow = ["stages.vectors.student.hidden=96", "stages.relations.student.hidden=96"]
    lines = [
        line for line in warnings(*narrow, file=LIBRARY / "embed-quickstart.yaml") if "heads of 8" in line
    ]
    assert [line.partition(":")[0] for line in lines] == ["stage relations"], (
        "a start has the heads that it has"
    )
    lines = warnings(*narrow, "stages.vectors.student.init=random", file=LIBRARY / "embed-quickstart.yaml")
    assert lines[-1].startswith("stage vectors: ") and lines[-1].endswith("a larger hidden, or fewer heads")


def test_rows_longer_than_a_teacher_of_the_hub_takes():
    (line,) = warnings("data.seq_len=1024", seq_len=1024)
    assert line == (
        "stage assistant: rows are 1024 tokens long and google-bert/bert-base-uncased takes at most 512, so that a run "
        "will refuse them; give a smaller seq_len"
    )
    assert warnings(seq_len=None) == []


def test_passes_over_the_data():
    data = Reading((Corpus("wiki", 1e6, 0.5), Corpus("books", 1e9, 0.5, estimated=True)))
    (first, second) = advice(load_recipe(ASSISTED), data=data)
    assert first == (
        "stage assistant: reads wiki 51 times (1,000,000 rows); language models gain next to nothing beyond 40 "
        "(arXiv:2305.16264): more text, or fewer steps"
    )
    assert second.startswith("stage student: reads wiki 51 times")
    few = Reading((Corpus("text", 100, 1.0, estimated=True),))
    assert "reads text about 1,024,000 times (about 100 rows)" in advice(load_recipe(ASSISTED), data=few)[0]


def test_check_and_plan_warn_alike_and_refuse_nothing(tmp_path, text, teacher, capsys):
    recipe = str(write_recipe(tmp_path, text, teacher))
    change = ["--set", "stages.small.student.layers=9"]
    assert main(["check", recipe, *change]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if ": warning: " in line]
    assert any("is no smaller than its teacher" in line for line in printed)
    assert main(["check", recipe, "--strict", "--json", *change]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["problems"] == [] and checked["sound"] is True
    assert [line.partition(": warning: ")[2] for line in printed] == checked["warnings"]
    assert main(["plan", recipe, "--json", *change]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    licence, *of_sizes = checked["warnings"]
    assert licence.startswith("no licence is known of teacher") and planned["warnings"] == of_sizes
    assert main(["plan", recipe, *change]) == 0
    assert "  warning       stage small: student" in capsys.readouterr().out


def test_check_says_which_assistants_it_makes(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: package:minilm/recipes/bert-l6-h384.yaml\nstages: [{name: student, assistant: auto}]\n"
    )
    assert main(["check", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{path}: sound; stages: student-assistant (400,000 steps), student (400,000 steps)",
        f"{path}: stage student-assistant: assistant: auto makes 12 x 384: 6 x 384 from 12 x 768 is half of both or "
        f"less (at most 6 layers and hidden 384)",
    ]
    assert not any("warning" in line for line in lines)


def test_advice_alone_is_light():
    code = "import minilm.orchestrator.plan.advice, sys; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
