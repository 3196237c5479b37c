"""`minilm show` prints a recipe that loads as the same one; `minilm diff` says what differs and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilm.orchestrator.cli import main
from minilm.orchestrator.recipe.library import LIBRARY
from minilm.orchestrator.recipe.load import load_recipe, read_recipe
from minilm.orchestrator.recipe.schema import SECTIONS, Embedding
from minilm.orchestrator.recipe.show import as_yaml, values
from minilm.orchestrator.system.files import write_json
from tests.test_recipe import BASE, FAMILY

ODD = json.dumps(
    {"a b": ["x: #", "\u0085\u2028", "on", "5e-4", "", "'\"", "*x", "é 😀", "~", "- a"]}, ensure_ascii=True
)
FORMS = {
    "base": BASE,
    "family": FAMILY,
    "null": BASE.replace("teacher: assistant", "teacher: assistant\n    max_gradient_norm: null"),
    "odd words": BASE.replace("  text:", f"  source: other\n  options: {ODD}\n  text:").replace(
        "corpus.txt", "['a: b', './x #y', '1', null.txt, '-', '*.txt', yes, \"line\\nbreak\"]"
    ),
    "shards": BASE.replace(
        "  text: corpus.txt\n  tokenizer: ./tokenizer", "  shards: s3://bucket/wiki\n  window: 8"
    ),
    "mixture": BASE.replace(
        "data:\n  text: corpus.txt\n  tokenizer: ./tokenizer",
        "data:\n- {shards: ./books, weight: 0.7}\n- {name: wiki, shards: s3://bucket/wiki}",
    ),
    "tokens": BASE.replace(
        "  text: corpus.txt\n", "  tokens: ./pair\n  source_tokenizer: owner/one\n  seq_len: 64\n"
    ),
    "relations": BASE.replace(
        "    batch: 64",
        "    relations: [{name: a, x: q, y: k}, {name: b, x: v, y: v, weight: 0.5}]\n    batch: 64",
    ),
    "assistant": BASE.replace("teacher: assistant", "assistant: auto\n    teacher: assistant"),
    "variables": 'vars: {A: 16, B: "${NO_SUCH:-corpus}"}\n'
    + BASE.replace("corpus.txt", "${B}.txt").replace(
        "batch: 64", "batch: ${A}\n    micro_batch: '${NO_SUCH:-8}'"
    ),
    "embedding": BASE.replace(
        "    batch: 64",
        "    objective: embedding\n    embedding: {dims: [48, 24], dense: true}\n    batch: 64",
    ).replace("  tokenizer:", "  packing: sentence\n  tokenizer:"),
    "evaluation": BASE + "evaluation: {tasks: [cola, stsb-embed], data: ./glue, train_rows: 9}\n"
    'promote: {min_share_of_teacher: 0.9, tasks: [cola]}\ncard: {license: mit, language: [en, "no"]}\n',
    "extends": "extends: sub/base.yaml\nname: other\nstages: [{name: student, steps: 7, warmup_steps: 1}]\n",
}


def write(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "base.yaml").write_text(BASE)
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_what_is_shown_loads_as_the_same_recipe(form, tmp_path):
    path = write(tmp_path, FORMS[form])
    recipe, source = read_recipe(path, ["compute.workers=[1, 2]", "compute.micro_batch=2"])
    again = tmp_path / "shown.yaml"
    again.write_text(as_yaml(recipe, source, "a head"))
    shown, shown_source = read_recipe(again)
    assert shown.result_fields() == recipe.result_fields()
    assert shown == recipe
    assert [(v.path, v.value) for v in values(shown, shown_source)] == [
        (v.path, v.value) for v in values(recipe, source)
    ]


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_packaged_recipes_are_shown(path, tmp_path, monkeypatch):
    recipe, source = read_recipe(path)
    again = tmp_path / path.name
    again.write_text(as_yaml(recipe, source))
    assert load_recipe(again).result_fields() == recipe.result_fields()


def test_every_key_is_shown_with_where_it_comes_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PART", "wiki")
    write(tmp_path, "extends: sub/base.yaml\nname: mine\nvars: {RATE: 1e-4}\ndata: {text: '/x/${PART}'}\n"
          "stages: [{name: student, peak_lr: '${RATE}', assistant: auto}]\n"
          "evaluation: {tasks: [cola], data: glue}\npromote: {}\ncard: {}\n")  # fmt: skip
    assert main(["show", "recipe.yaml", "--set", "seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# recipe.yaml over sub/base.yaml, with every default; relative paths count from ./"
    found = {tuple(line.split("  # ")[0].split()): line.split("  # ")[1] for line in lines if "  # " in line}
    assert found["name:", "mine"] == "recipe.yaml:2"
    assert found["seed:", "7"] == "--set"
    assert found["text:", "[/x/wiki]"] == "recipe.yaml:4, /x/${PART} from environment $PART"
    assert found["peak_lr:", "0.0001"] == "recipe.yaml:5, ${RATE} from recipe.yaml:3"
    assert found["tokenizer:", "./sub/tokenizer"] == "sub/base.yaml:4"
    assert found["experiment:", "mine"] == "default: the recipe's name"
    assert found["heads:", "null"] == "default: the teacher's"
    assert any("- # assistant: auto makes" in line or "# assistant: auto makes" in line for line in lines)
    keys = {line.strip().lstrip("- ").partition(":")[0] for line in lines}
    nowhere = {
        "corpora",
        "shards",
        "tokens",
        "source_tokenizer",
        "fairseq_dict",
        "encoder",
        "x",
        "y",
        "weight",
        "probe",
        "every",
        "share_of_teacher",
        "patience",
        "min_gain",
        *Embedding.model_fields,
    }
    assert {key for kind in SECTIONS.values() for key in kind.model_fields} - nowhere <= keys
    digest = next(line for line in lines if line.startswith("# digest "))
    (tmp_path / "again.yaml").write_text("\n".join(lines))
    assert main(["show", "again.yaml"]) == 0
    assert digest in capsys.readouterr().out
    assert main(["show", "recipe.yaml", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert {"path": "name", "value": "mine", "origin": "recipe.yaml:2"} in whole["values"]


def diff(capsys, *arguments: str | Path) -> list[str]:
    assert main(["diff", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_diff_says_what_differs_and_what_becomes_useless(tmp_path, capsys):
    a = write(tmp_path, BASE)
    assert diff(capsys, a, a) == ["A and B are the same recipe"]
    assert diff(capsys, a, a, "--set", "stages.student.steps=7", "--set", "stages.student.warmup_steps=1",
                "--set", "compute.threads=2", "--set", "stages.student.eval_every=5") == [
        "compute.threads: null → 2   (changes no result)",
        "stages.student.steps: 100 → 7",
        "stages.student.warmup_steps: 10 → 1",
        "stages.student.eval_every: null → 5   (changes no result)",
        "",
        "useless of A's work: stage student, because stages.student.steps is 100 there and 7 now",
        "kept: assistant",
    ]  # fmt: skip
    assert diff(capsys, a, a, "--set", "stages.assistant.batch=32", "--set", "name=other") == [
        'name: "tiny" → "other"',
        "stages.assistant.batch: 64 → 32",
        'tracking.experiment: "tiny" → "other"   (changes no result)',
        "",
        "B has another name, so that it needs a work directory of its own",
        "useless of A's work: stage assistant, because stages.assistant.batch is 64 there and 32 now",
        "useless of A's work: stage student, because its teacher assistant comes from stage assistant",
    ]


def test_diff_names_stages_and_students_of_one_side(tmp_path, capsys):
    a = write(tmp_path, BASE)
    b = tmp_path / "b.yaml"
    b.write_text(BASE.replace("student: {layers: 2, hidden: 24}", "students: [{name: student, layers: 2, hidden: 24}, "
                 "{name: more, layers: 1, hidden: 24}]") + "  - {name: last, teacher: more, student: {layers: 1, "
                 "hidden: 12}, batch: 32, steps: 9, peak_lr: 1e-3, warmup_steps: 1}\n")  # fmt: skip
    assert diff(capsys, a, b) == [
        "stages.student.students.more: only in B",
        "stages.last: only in B",
        "",
        "useless of A's work: stage student, because stages.student.students.1 is None there and "
        "{'name': 'more', 'layers': 1, 'hidden': 24, 'ffn': 96, 'h... now",
        "kept: assistant",
        "new in B: last",
    ]
    assert "left out in B: last" in diff(capsys, b, a)


def test_diff_takes_a_runs_work_directory(tmp_path, capsys):
    recipe = write(tmp_path, BASE)
    write_json(tmp_path / "work" / "run.json", {"recipe": load_recipe(recipe).result_fields(), "data": []})
    assert diff(capsys, tmp_path / "work", recipe) == ["A and B are the same recipe"]
    lines = diff(capsys, tmp_path / "work", recipe, "--set", "seed=3")
    assert lines[0] == "seed: 0 → 3" and lines[2].startswith(
        "useless of A's work: stage assistant, because seed is"
    )
    assert main(["diff", str(tmp_path / "sub"), str(recipe)]) == 2
    assert (
        "given a folder without run.json; allowed: a recipe, or the work directory of a run"
        in capsys.readouterr().err
    )
    assert main(["diff", "--json", str(recipe), str(recipe)]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
