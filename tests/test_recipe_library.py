"""The library of recipes says what the paper says, to the last number, and each file explains itself."""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jsonschema
import pytest
import torch

from minilm.orchestrator.cli import main
from minilm.orchestrator.plan.cost import Machine, Work, flops_per_second, plan
from minilm.orchestrator.plan.estimate import works
from minilm.orchestrator.plan.hardware import machine_by_sheet
from minilm.orchestrator.plan.report import long, total_seconds
from minilm.orchestrator.recipe.json_schema import SCHEMA_FILE, schema_text
from minilm.orchestrator.recipe.language.extends import read_chain
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.references import HubRef, RegistryRef, parse_reference
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.recipe.yaml_source import read_file
from tests.conftest import make_teacher

LIBRARY = SCHEMA_FILE.parent
TEACHERS = {
    "bert": HubRef("google-bert/bert-base-uncased"),
    "xlmr": HubRef("FacebookAI/xlm-roberta-base"),
    "inhouse": RegistryRef("models:/inhouse-bert-base@newest"),  # not public: the user provides it
}
# MiniLM (arXiv:2002.10957), sections 4.1, 5.1, 5.3 and table 3; L is the number of layers.
TABLE = """
id assistant L hidden ffn heads vocab seq batch lr beta1 beta2 decay drop warmup schedule steps
bert-l6-h768 - 6 768 3072 12 30522 512 1024 5e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l12-h384 - 12 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l6-h384 - 6 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l4-h384 - 4 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l3-h384 - 3 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l6-h384-ta bert-l12-h384 6 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l4-h384-ta bert-l12-h384 4 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
bert-l3-h384-ta bert-l12-h384 3 384 1536 12 30522 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 400000
inhouse-l12-h384 - 12 384 1536 12 30522 512 2048 6e-4 0.9 0.98 0.01 0.1 4000 linear 400000
inhouse-l6-h384-ta inhouse-l12-h384 6 384 1536 12 30522 512 512 4e-4 0.9 0.999 0.01 0.1 4000 linear 400000
xlmr-l12-h384 - 12 384 1536 12 250002 512 256 3e-4 0.9 0.999 0.01 0.1 4000 linear 1000000
xlmr-l6-h384-ta xlmr-l12-h384 6 384 1536 12 250002 512 512 6e-4 0.9 0.999 0.01 0.1 4000 linear 400000
"""
ROWS = [line.split() for line in TABLE.splitlines()[2:]]
FILES = sorted(path.name for path in LIBRARY.glob("*.yaml"))
MODERN = ("modernbert-l7-h256", "modernbert-l10-h384", "mpnet-l6-h384", "eurobert-l6-h384")
FIRST = ("domain-adapt", "tiny-cpu", "multilingual-small")  # what a practitioner wants first
QUICK = ("quickstart.yaml", "embed-quickstart.yaml")  # with teachers that packages hold


def as_row(recipe: Recipe, number: int) -> tuple[object, ...]:
    """What stage `number` says, in the order of the table from L (layers) on, without the vocabulary."""
    stage = recipe.stages[number]
    (student,) = stage.students
    shape = (student.layers, student.hidden, student.ffn or 4 * student.hidden, student.heads)
    optimiser = (stage.batch, stage.peak_lr, *stage.adam_betas, stage.weight_decay, student.dropout)
    return (*shape, recipe.data.seq_len, *optimiser, stage.warmup_steps, stage.schedule, stage.steps)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_recipe_is_its_row(row: list[str]) -> None:
    name, assistant, *rest = row
    vocabulary = rest.pop(4)
    recipe = load_recipe(LIBRARY / f"{name}.yaml")
    assert recipe.name == name
    assert (
        recipe.teacher_ref(recipe.stages[0])
        == parse_reference(recipe.data.tokenizer)
        == TEACHERS[name.partition("-")[0]]
    )
    assert {stage.objective for stage in recipe.stages} == {"minilm"}
    assert f"{int(vocabulary):,} tokens" in header(f"{name}.yaml")
    assert as_row(recipe, -1) == tuple(text if text == "linear" else float(text) for text in rest)
    if assistant == "-":
        assert len(recipe.stages) == 1
    else:
        assert len(recipe.stages) == 2
        assert recipe.stages[1].teacher == recipe.stages[0].students[0].name
        assert as_row(recipe, 0) == as_row(load_recipe(LIBRARY / f"{assistant}.yaml"), -1)


# MiniLMv2 (arXiv:2012.15828): teachers, layers and relation heads by its section 4; batch, rate, warm-up and steps as a
# public reimplementation has them too (bloomberg/minilmv2.bb, run.sh). All else is as in bert-l6-h384.
V2_TABLE = """
id teacher layer L hidden ffn relation_heads vocab batch lr warmup steps
v2-bert-l6-h384 google-bert/bert-base-uncased last 6 384 1536 48 30522 256 6e-4 4000 400000
v2-bert-l12-h384 google-bert/bert-base-uncased last 12 384 1536 48 30522 256 6e-4 4000 400000
v2-bert-l6-h768 google-bert/bert-base-uncased last 6 768 3072 48 30522 256 6e-4 4000 400000
v2-bert-large-l6-h384 google-bert/bert-large-uncased 21 6 384 1536 64 30522 256 6e-4 4000 400000
v2-bert-large-l12-h384 google-bert/bert-large-uncased 21 12 384 1536 64 30522 256 6e-4 4000 400000
v2-roberta-large-l6-h384 FacebookAI/roberta-large 19 6 384 1536 64 50265 256 6e-4 4000 400000
v2-roberta-large-l12-h384 FacebookAI/roberta-large 19 12 384 1536 64 50265 256 6e-4 4000 400000
v2-xlmr-large-l6-h384 FacebookAI/xlm-roberta-large 19 6 384 1536 64 250002 256 6e-4 4000 1000000
v2-xlmr-large-l12-h384 FacebookAI/xlm-roberta-large 19 12 384 1536 64 250002 256 6e-4 4000 1000000
"""
V2_ROWS = [line.split() for line in V2_TABLE.splitlines()[2:]]
# The ablation arms of bert-l6-h384, with the figures of SQuAD 2, MNLI-m and SST-2 (MiniLM, tables 3 and 5 to 7).
ARMS = {
    "attention-only": "71.0 / 80.9 / 89.9",
    "value-mse": "71.4 / 82.0 / 90.8",
    "layer-to-layer": "71.6 / 81.8 / 90.6",
    "soft-label-mlm": "67.9 / 79.6 / 89.8",
    "hidden-relation": "",
}


@pytest.mark.parametrize("row", V2_ROWS, ids=lambda row: row[0])
def test_a_recipe_of_minilmv2_is_its_row(row: list[str]) -> None:
    name, teacher, layer, layers, hidden, ffn, relation_heads, vocabulary, batch, rate, warmup, steps = row
    recipe, base = load_recipe(LIBRARY / f"{name}.yaml"), load_recipe(LIBRARY / "bert-l6-h384.yaml")
    (stage,), (of_base,) = recipe.stages, base.stages
    assert recipe.name == name and recipe.data.tokenizer == teacher
    assert f"{int(vocabulary):,} tokens" in header(f"{name}.yaml")
    changes = {
        "teacher": teacher, "teacher_layer": layer if layer == "last" else int(layer), "objective": "minilmv2",
        "relation_heads": int(relation_heads), "batch": int(batch), "peak_lr": float(rate),
        "warmup_steps": int(warmup), "steps": int(steps),
    }  # fmt: skip
    student = {"layers": int(layers), "hidden": int(hidden), "ffn": int(ffn)}
    (expected,) = of_base.result_fields()["students"]
    assert stage.result_fields() == of_base.result_fields() | changes | {"students": [expected | student]}
    data = {"tokenizer": teacher}
    assert recipe.data.result_fields() == base.data.result_fields() | data


@pytest.mark.parametrize("arm", ARMS)
def test_an_ablation_arm_with_an_assistant_differs_by_its_objective_alone(arm: str) -> None:
    recipe = load_recipe(LIBRARY / f"bert-l6-h384-ta-{arm}.yaml")
    base = load_recipe(LIBRARY / "bert-l6-h384-ta.yaml").result_fields()
    stages = [fields | {"objective": arm} for fields in base["stages"]]
    assert recipe.result_fields() == base | {"name": recipe.name, "stages": stages}


@pytest.mark.parametrize("arm", ARMS)
def test_an_ablation_arm_differs_by_its_objective_alone(arm: str) -> None:
    file = f"bert-l6-h384-{arm}.yaml"
    recipe, base = load_recipe(LIBRARY / file), load_recipe(LIBRARY / "bert-l6-h384.yaml")
    (fields,) = recipe.result_fields()["stages"]
    (of_base,) = base.result_fields()["stages"]
    assert fields == of_base | {"objective": arm}
    rest = base.result_fields() | {"name": recipe.name, "stages": [fields]}
    assert recipe.result_fields() == rest and ARMS[arm] in header(file)
    assert (LIBRARY / file).read_text(encoding="utf-8").partition("\nname: ")[2].split() == [
        f"bert-l6-h384-{arm}", "stages:", "-", "name:", "student", "objective:", arm,
    ]  # fmt: skip


SHAPES = {  # as their config.json has them
    "google-bert/bert-base-uncased": ("bert", 12, 768, 12, 3072, 30522),
    "google-bert/bert-large-uncased": ("bert", 24, 1024, 16, 4096, 30522),
    "FacebookAI/roberta-large": ("roberta", 24, 1024, 16, 4096, 50265),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", 12, 768, 12, 3072, 250002),
    "FacebookAI/xlm-roberta-large": ("xlm-roberta", 24, 1024, 16, 4096, 250002),
    "sentence-transformers/all-mpnet-base-v2": ("mpnet", 12, 768, 12, 3072, 30527),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", 6, 384, 12, 1536, 30522),
    "microsoft/mpnet-base": ("mpnet", 12, 768, 12, 3072, 30527),
    "answerdotai/ModernBERT-base": ("modernbert", 22, 768, 12, 1152, 50368),
    "EuroBERT/EuroBERT-210m": ("eurobert", 12, 768, 12, 3072, 128256),
}
OWN = {  # teachers that a user has: what is planned with instead
    "models:/inhouse-bert-base@newest": SHAPES["google-bert/bert-base-uncased"],
    "encoder": SHAPES["google-bert/bert-base-uncased"],
    "smaller": (*SHAPES["FacebookAI/xlm-roberta-base"][:5], 30000),
}
LONGEST = {"modernbert": 8192, "eurobert": 8192, "bert": 512}
# of student's layers and hidden size: parameters without embeddings, as the papers print them, in millions
PRINTED_TOTAL = {
    (6, 768): 66,
    (12, 384): 33,
    (6, 384): 22,
    (4, 384): 19,
    (3, 384): 17,
}  # with the table of tokens
PRINTED = {(6, 768): 42.5, (12, 384): 21.3, (6, 384): 10.6, (4, 384): 7.1, (3, 384): 5.3}


def teachers(file: str, folder: Callable[[str], str]) -> list[str]:
    """Overrides that give every stage of the file whose teacher is no student another one."""
    stages = read_chain(LIBRARY / file).values["stages"]
    students = load_recipe(LIBRARY / file).student_names
    given = {stage["name"]: stage["teacher"] for stage in stages if stage["teacher"] not in students}
    own = read_chain(LIBRARY / file).values.get("vars", {}).get("TEACHER", "")
    return [f"stages.{name}.teacher={folder(own if '$' in text else text)}" for name, text in given.items()]


def starts(file: str, folder: Callable[[str], str]) -> list[str]:
    """Overrides that give every student that goes on from a model from outside another one."""
    recipe = load_recipe(LIBRARY / file)
    return [
        f"stages.{stage.name}.student.init={folder(student.starts_from)}"
        for stage in recipe.stages
        for student in stage.students
        if student.starts_from and student.starts_from not in recipe.student_names
    ]


def of_its_shape(out: Path, reference: str) -> str:
    """A folder with the config of a teacher, as its owner published it, and no weights."""
    from transformers import AutoConfig

    from minilm.model.encoder.sentence_head import SentenceHead, save_head
    from minilm.model.encoder.sentence_layout import SentenceLayout

    shape = OWN.get(reference.removeprefix("./")) or SHAPES[reference]
    kind, layers, hidden, heads, ffn, vocabulary = shape
    AutoConfig.for_model(
        kind, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=ffn,
        vocab_size=vocabulary, max_position_embeddings=LONGEST.get(kind, 514),
        architectures=["BertForMaskedLM"] if kind == "bert" else None,
    ).save_pretrained(out / kind)  # fmt: skip
    save_head(SentenceHead(SentenceLayout()), out / kind, hidden, 512)
    (out / kind / "vocab.txt").touch()
    return str(out / kind)


def planned_hours(recipe: Recipe, all_work: list[Work]) -> str:
    """As the head of its file says it."""
    if recipe.name == "tiny-cpu":
        rate = 3_800  # tokens a second of 6 x 384 → 6 x 192 on two cores of an Intel Xeon, 2026-11-28
        machine, where = Machine(flops_per_second(all_work[0], rate)), "two cores"
        how = f"--tokens-per-second {rate}, as on an Intel Xeon"
    else:
        machine, where, how = machine_by_sheet("h100", "bfloat16"), "one H100", "--hardware h100x1"
    seconds = total_seconds([plan(work, machine, [1]) for work in all_work], 1)
    return f"# Hours:    {long(seconds)} on {where}, computed (minilm plan {how}), not measured."


def often(file: str) -> bool:
    """Planned in the default run: those of no arm and no large teacher, whose plans are much alike."""
    return "large" not in file and not any(arm in file for arm in ARMS)


@pytest.mark.parametrize(
    "file", [f if often(f) else pytest.param(f, marks=pytest.mark.slow) for f in FILES if f not in QUICK]
)
def test_every_recipe_plans_with_a_teacher_of_its_own_shape(file: str, tmp_path: Path) -> None:
    """Of the teacher's config, with no weights: its sizes, the papers' parameters, the hours in the head, and what the
    objective needs."""
    given = [change for find in (teachers, starts) for change in find(file, partial(of_its_shape, tmp_path))]
    recipe = load_recipe(LIBRARY / file, given)
    device = ("cpu", "float32") if recipe.compute.device == "cpu" else ("cuda", "bfloat16")
    all_work = works(recipe, None, *device)
    hours = planned_hours(recipe, all_work)
    assert hours in header(file), f"the head of {file} is to say:\n{hours}"
    for stage, work in zip(recipe.stages, all_work, strict=True):
        (student,) = stage.students
        (body,) = work.students
        hidden = student.hidden
        reads_all = work.teacher.attentions == work.teacher.layers
        assert reads_all == (stage.objective in ("embedding", "soft-label-mlm", "hidden-relation"))
        if "modernbert" in file:
            assert body.ffn == 1.5 * hidden, "its own ratio"
        if (student.layers, hidden) not in PRINTED or "bert-" not in file:
            continue
        matrices, biases_and_norms = 4 * hidden**2 + 2 * hidden * body.ffn, 9 * hidden + body.ffn
        without = student.layers * (matrices + biases_and_norms)
        assert round(without / 1e6, 1) == PRINTED[student.layers, hidden]
        assert body.parameters > without
        if recipe.data.tokenizer == "google-bert/bert-base-uncased":
            assert round((without + 30522 * hidden) / 1e6) == PRINTED_TOTAL[student.layers, hidden]


# MiniLM, tables 2 and 3 (and 5 to 7 for the arms, 8 for the in-house teacher); MiniLMv2: microsoft/unilm, minilm. Speed
# against the teacher; SQuAD 2 F1, MNLI-m and SST-2 of the student.
RESULTS = """
id parameters without speed squad2 mnli sst2
bert-l6-h768 66 42.5 2.0 76.4 84.0 92.0
bert-l12-h384 33 21.3 2.7 - - -
bert-l6-h384 22 10.6 5.3 72.4 82.2 91.0
bert-l6-h384-ta 22 10.6 5.3 72.7 82.4 91.2
bert-l4-h384 19 7.1 7.8 69.4 80.3 90.2
bert-l4-h384-ta 19 7.1 7.8 69.7 80.6 90.6
bert-l3-h384 17 5.3 10.1 66.2 78.8 89.3
bert-l3-h384-ta 17 5.3 10.1 66.9 79.1 89.7
bert-l6-h384-attention-only 22 10.6 5.3 71.0 80.9 89.9
bert-l6-h384-value-mse 22 10.6 5.3 71.4 82.0 90.8
bert-l6-h384-layer-to-layer 22 10.6 5.3 71.6 81.8 90.6
bert-l6-h384-soft-label-mlm 22 10.6 5.3 67.9 79.6 89.8
inhouse-l12-h384 33 21.3 2.7 81.7 85.7 93.0
inhouse-l6-h384-ta 22 10.6 5.3 75.6 83.3 91.5
v2-bert-l6-h768 66 42.5 2.0 76.3 84.2 -
v2-bert-l6-h384 22 10.6 5.3 72.9 82.8 -
"""
RESULT_ROWS = {row[0]: row[1:] for row in map(str.split, RESULTS.splitlines()[2:])}


def expected(name: str) -> list[str]:
    """The parts of a head's "Expect:" that have figures of the papers."""
    parameters, without, speed, *scores = RESULT_ROWS[name]
    named = dict(zip(("SQuAD 2 F1", "MNLI-m", "SST-2"), scores, strict=True))
    known = {task: score for task, score in named.items() if score != "-"}
    parts = [f"{parameters} M parameters, {without} M without embeddings, {speed} times as fast as BERT-base"]
    return parts + ([f"{' / '.join(known)} {' / '.join(known.values())}"] if known else [])


@pytest.mark.parametrize("name", RESULT_ROWS)
def test_a_head_has_the_papers_figures(name: str) -> None:
    text = " ".join(header(f"{name}.yaml").replace("#", " ").split())
    for part in expected(name):
        assert part in text, f"the head of {name} is to say: {part}"


def test_the_page_about_sizes_has_the_papers_figures() -> None:
    page = (LIBRARY.parent / "docs" / "sizes.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")
    ]
    sizes = {row[-1]: row for row in cells if row[-1].startswith("bert-l")}
    tables_2_and_3 = {name: row for name, row in RESULT_ROWS.items() if sizes.get(name)}
    assert set(sizes) == {
        name for name, _ in RESULT_ROWS.items() if re.fullmatch(r"bert-l\d+-h\d+(-ta)?", name)
    }
    for name, (parameters, without, speed, *scores) in tables_2_and_3.items():
        known = [score for score in scores if score != "-"]
        mean = [f"{sum(map(float, known)) / 3 + 1e-9:.1f}"] if known else [""]
        assert sizes[name][1:-1] == [f"{parameters} M", f"{without} M", speed, *(known or [""] * 3), *mean]
    objectives = {row[0].split("`")[1]: row[1:] for row in cells if row[0].startswith("`") and len(row) == 4}
    by_recipe = {"minilm": "bert-l6-h384", "minilmv2": "v2-bert-l6-h384"}
    assert set(objectives) == {*(arm for arm in ARMS if ARMS[arm]), *by_recipe}
    for objective, scores in objectives.items():
        row = RESULT_ROWS[by_recipe.get(objective, f"bert-l6-h384-{objective}")]
        assert scores == [score.replace("-", "") for score in row[3:]]


def test_the_library_is_the_rows_the_arms_and_the_quickstart() -> None:
    named = [*(row[0] for row in (*ROWS, *V2_ROWS)), *(f"bert-l6-h384-{arm}" for arm in ARMS)]
    named += [f"bert-l6-h384-ta-{arm}" for arm in ARMS]
    named += [
        "quickstart",
        "embed-quickstart",
        "embed-mpnet-l6-h384",
        "embed-mpnet-from-minilm",
        *MODERN,
        *FIRST,
    ]
    assert sorted(f"{name}.yaml" for name in named) == FILES


def test_the_quickstarts_student_teaches_a_narrower_one() -> None:
    recipe = load_recipe(LIBRARY / "quickstart.yaml")
    shapes = [(s.layers, s.hidden, s.heads) for stage in recipe.stages for s in stage.students]
    assert shapes == [(3, 384, 12), (3, 192, 12)]
    assert [stage.teacher for stage in recipe.stages] == [recipe.data.tokenizer, "student"]
    assert (recipe.data.seq_len, recipe.data.packing) == (128, "full")


@pytest.mark.parametrize("name", ["embed-quickstart", "embed-mpnet-l6-h384"])
def test_an_embedder_learns_relations_first_and_goes_on_with_vectors_of_the_same_teacher(name: str) -> None:
    recipe = load_recipe(LIBRARY / f"{name}.yaml")
    relations, vectors = recipe.stages
    (start,), (embedder,) = relations.students, vectors.students
    assert (relations.objective, vectors.objective) == ("minilm", "embedding")
    assert relations.teacher == vectors.teacher == recipe.data.tokenizer
    assert embedder.init == start.name and recipe.data.packing == "sentence"
    assert (start.layers, start.hidden, start.heads) == (embedder.layers, embedder.hidden, embedder.heads)


def test_an_embedder_goes_on_from_a_small_model_that_embeds_already() -> None:
    (vectors,) = load_recipe(LIBRARY / "embed-mpnet-from-minilm.yaml").stages
    (embedder,) = vectors.students
    assert (
        embedder.starts_from == "sentence-transformers/all-MiniLM-L6-v2" and vectors.objective == "embedding"
    )


def header(file: str) -> str:
    lines = (LIBRARY / file).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("file", FILES)
def test_each_file_says_what_it_is_for(file: str) -> None:
    text = header(file)
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    parts = (
        "# Purpose:",
        f"minilm run recipes/{file}",
        "# Needs:",
        "# Hours:",
        "# Expect:",
        "# Source:   MiniLM",
    )
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places, strict=True))


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_is_copied_with_what_it_extends(file: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = file.removesuffix(".yaml")
    assert main(["copy", name, "--to", "mine"]) == 0
    assert capsys.readouterr().out.startswith(f"mine/{file} is yours")
    assert load_recipe(f"mine/{file}").result_fields() == load_recipe(LIBRARY / file).result_fields()
    text = Path("mine", file).read_text()
    assert f"minilm run mine/{file}" in text and f"$schema={SCHEMA_FILE}\n" in text
    assert main(["copy", name, "--to", "mine"]) == 0, "the same again changes nothing"


def test_a_copy_replaces_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("mine\n")
    assert main(["copy", "quickstart"]) == 2
    assert Path("quickstart.yaml").read_text() == "mine\n"
    assert main(["copy", "quickstrt"]) == 2
    Path("file").write_text("")
    assert main(["copy", "quickstart", "--to", "file/below"]) == 2
    assert [line.partition("; allowed: ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "minilm: error: quickstart.yaml is there already, with another content; move it away, or copy to another "
        "folder: --to FOLDER",
        "minilm: error: given 'quickstrt'; did you mean 'quickstart'?",
        "minilm: error: can't write into file/below: Not a directory; copy to another folder: --to FOLDER",
    ]


EXTENDING = """
extends: base.yaml
vars: {A: 1, B: text}
x-shared: &shared {batch: 8}
stages: [{<<: *shared, name: a, assistant: auto, steps: "${STEPS:-7}", student: {layers: 2}}]
compute: {workers: [1, 2], device: "${DEVICE}"}
evaluation: {controls: false}
"""


def test_the_schema_knows_whole_recipes_and_those_that_extend_one(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)

    def problems(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        values = read_file(tmp_path / "recipe.yaml").values
        errors = jsonschema.Draft202012Validator(schema).iter_errors(values)
        return sorted(".".join(map(str, error.absolute_path)) for error in errors)

    for file in FILES:
        assert problems((LIBRARY / file).read_text(encoding="utf-8")) == []
    assert problems(EXTENDING) == []
    assert problems(EXTENDING.replace("extends: base.yaml\n", "")) != []
    assert problems(EXTENDING.replace("${DEVICE}", "tpu")) == ["compute.device"]
    assert problems(EXTENDING.replace("assistant: auto", "assistant: yes please")) == ["stages.0.assistant"]
    assert problems(EXTENDING.replace("extends: base.yaml", "extends: 3")) == ["extends"]


def test_the_schema_is_made_from_the_types() -> None:
    again = "run: python -m minilm.orchestrator.recipe.json_schema"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), again


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By its family: a teacher of 24 narrow layers, which every recipe of the library can have."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    from minilm.model.encoder.sentence_head import SentenceHead, save_head
    from minilm.model.encoder.sentence_layout import SentenceLayout

    @cache
    def made(kind: str) -> Path:
        folder = make_teacher(tmp_path_factory.mktemp("stand-in") / kind, layers=24, hidden=192, heads=12)
        if kind == "bert":
            AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
        else:
            config = AutoConfig.for_model(
                kind, num_hidden_layers=22, hidden_size=192, num_attention_heads=12, num_key_value_heads=12,
                head_dim=16, intermediate_size=288, vocab_size=AutoConfig.from_pretrained(folder).vocab_size,
                max_position_embeddings=66, pad_token_id=1 if kind == "mpnet" else 0, bos_token_id=2, cls_token_id=2,
                eos_token_id=3, sep_token_id=3,
            )  # fmt: skip
            with torch.random.fork_rng():
                AutoModel.from_config(config).save_pretrained(folder)
        save_head(SentenceHead(SentenceLayout()), folder, 192, 64)
        return folder

    return made


def run_three_steps(file: str, teacher: Path, text: Path, work: Path) -> None:
    """With its own layers, heads, teacher layer and objective; narrower, on short rows."""
    source = read_chain(LIBRARY / file).values
    changes = [f"data.text={text}", f"data.tokenizer={teacher}", "data.seq_len=32", "data.held_out=0.1"]
    changes += starts(file, lambda _: "random")
    changes += [*teachers(file, lambda _: str(teacher)), "compute={micro_batch: 2, threads: 1}"]
    few = {"steps": 3, "warmup_steps": 1, "batch": 4, "held_out_rows": 4, "eval_every": 3}
    for stage in source["stages"]:
        own = few | {"student.hidden": 192, "student.ffn": 288}
        if stage.get("assistant") == "auto":  # of this teacher the rule would ask for none
            own |= {"assistant": 12}
        changes += [f"stages.{stage['name']}.{key}={value}" for key, value in own.items()]
    options = [word for change in changes for word in ("--set", change)]
    command = ["run", str(LIBRARY / file), "--launcher", "inline", "--workdir", str(work), "-q", *options]
    assert main(command) == 0
    summary = json.loads((work / "summary.json").read_text())
    students = load_recipe(LIBRARY / file).student_names
    assert [m["name"] for m in summary["models"] if m["registered"]] == list(students)


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FILES if f not in QUICK])
def test_every_recipe_runs_three_steps_with_a_stand_in(
    file: str, stand_in: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    kinds = ("modernbert", "eurobert", "mpnet")
    kind = next((kind for kind in kinds if file.startswith(kind)), "bert")
    run_three_steps(file, stand_in(kind), text, tmp_path / "work")
