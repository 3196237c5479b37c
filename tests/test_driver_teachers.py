"""Teachers of every family and of many oddities go through check, run, export and AutoModel; or are refused in one line
by both `check` and `run`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoTokenizer

from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.shape import shape_of
from minilm.model.export import weights_digest
from minilm.orchestrator import cli
from minilm.orchestrator.driver.curriculum import Driver
from minilm.orchestrator.driver.made_starts import with_made_starts
from minilm.orchestrator.driver.prepare_data import prepare_data
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.resolve.folders import folder_here
from minilm.orchestrator.resolve.stages import resolve
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.tracking.model_files import model_files
from minilm.orchestrator.worker.error_file import run_alone
from tests.odd_teachers import REFUSED, SOUND, plain

SEQ_LEN = 32
STAGE = {"batch": 4, "steps": 2, "peak_lr": 1e-3, "warmup_steps": 1, "held_out_rows": 4}


def write_recipe(path: Path, shards: Path, stages: list[dict[str, object]], **changes: object) -> Path:
    recipe = {"name": "odd", "data": {"shards": str(shards)}, "stages": stages}
    recipe |= {"compute": {"micro_batch": 4, "threads": 1}, "tracking": {"log_every": 1}}
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    for name, (kind, model, config, change, _, _) in SOUND.items():
        plain(root / name, teacher, kind, model, **config)
        change(root / name)
    return {name: root / name for name in SOUND}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], shards: Path) -> Path:
    """One recipe with a stage for each teacher."""
    stages = []
    for name, (_, _, _, _, student, stage) in SOUND.items():
        student = {"layers": 2, "hidden": 24} | student
        stages.append({"name": name, "teacher": str(teachers[name]), "student": student, **STAGE, **stage})
    return write_recipe(tmp_path_factory.mktemp("run") / "odd.yaml", shards, stages)


@pytest.fixture(scope="module")
def specs(recipe: Path) -> dict[str, StageSpec]:
    """What the workers of each stage are given."""
    loaded, workdir = load_recipe(recipe), Workdir(recipe.parent / "work")
    stages, problems = resolve(loaded, folder_here)
    assert not problems
    data = prepare_data(loaded, workdir, lambda reference: str(folder_here(reference)), None)
    driver = Driver(loaded, workdir, None, data, tuple(stages), [], None, None, None, None)  # type: ignore[arg-type]
    return {resolved.stage.name: replace(driver.make_spec(resolved), lease="") for resolved in stages}


@pytest.fixture(scope="module")
def students(specs: dict[str, StageSpec]) -> Callable[[str], Path]:
    """The exported student of a stage, whose worker is run once."""

    @functools.cache
    def student(name: str) -> Path:
        spec = with_made_starts(specs[name])
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        assert run_alone(spec), json.loads(StageFolder(Path(spec.folder)).failure.read_text())["message"]
        return StageFolder(Path(spec.folder)).student(name)

    return student


def test_check_takes_all_of_them(recipe, capsys):
    assert cli.main(["check", str(recipe)]) == 0
    notes = [
        line.partition("warning: ")[2]
        for line in capsys.readouterr().out.splitlines()
        if "keeps positions" in line
    ]
    assert notes == [
        "stage kept-positions: student 'kept-positions' keeps positions 33 to 63 as they start, at random, because "
        "rows have 32 tokens: longer rows will not be what it learned; positions: cut (the default) leaves them out"
    ]


@pytest.mark.parametrize("name", SOUND)
def test_a_student_of_each_loads_by_automodel_and_says_what_it_was_trained_on(name, students, teachers):
    folder = students(name)
    kind, _, _, _, student, _ = SOUND[name]
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    unread = {key.split(".")[0] for key in report["unexpected_keys"]}
    assert not [key for key in report["missing_keys"] if "pooler" not in key] and unread <= {"cls"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())

    longest = shape_of(model.config).max_tokens
    whole = shape_of(AutoConfig.from_pretrained(teachers[name])).max_tokens
    assert longest == (SEQ_LEN if student.get("positions", "cut") == "cut" else whole)
    assert tokenizer.model_max_length == longest
    card = (folder / "README.md").read_text()
    assert f"| Longest row | {longest} tokens" in card and ("as in training" in card) == (longest == SEQ_LEN)

    with torch.no_grad():
        hidden = model(
            **tokenizer(["time year people " * 40], truncation=True, return_tensors="pt")
        ).last_hidden_state
    assert hidden.shape == (1, longest, model.config.hidden_size) and hidden.isfinite().all()
    left = {
        "auto_map",
        "problem_type",
        "id2label",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
    }
    left |= {"return_dict", "_attn_implementation", "pruned_heads", "quantization_config", "num_labels"}
    assert not left & set(config) and "minilm" not in json.dumps(config)
    assert config["model_type"] == kind and config.get("chunk_size_feed_forward", 0) == 0


def test_a_projected_start_is_made_before_the_workers_begin_and_the_same_anywhere(teacher, shards, tmp_path):
    student = {"layers": 2, "hidden": 24, "init": "teacher-pca"}
    stage = {"name": "small", "teacher": str(teacher), "student": student, **STAGE}
    path = write_recipe(tmp_path / "odd.yaml", shards, [stage])
    found = []
    for name in ("one", "other"):
        work = tmp_path / name
        assert cli.main(["run", str(path), "--launcher", "inline", "--workdir", str(work)]) == 0
        (start,) = (work / "stages/small/starts").iterdir()
        card = (work / "stages/small/students/small/README.md").read_text()
        assert f"| Started from | teacher-pca (weights {weights_digest(start)[:12]}) |" in card
        found.append(
            (start.name, weights_digest(start), weights_digest(work / "stages/small/students/small"))
        )
    assert found[0] == found[1] and found[0][1] != found[0][2]


def test_positions_behind_the_rows_are_those_of_a_projected_start(students, specs):
    name = "projected-positions"
    start = with_made_starts(specs[name]).students[0].start
    own, first = (
        AutoModel.from_pretrained(folder).embeddings.position_embeddings.weight
        for folder in (students(name), start)
    )
    assert own.shape == first.shape and torch.equal(own[SEQ_LEN:], first[SEQ_LEN:])
    assert not torch.equal(own[:SEQ_LEN], first[:SEQ_LEN])


def test_positions_behind_the_rows_are_the_teachers_where_the_recipe_says_so(students, teachers):
    name = "teachers-positions"
    own, theirs = (
        AutoModel.from_pretrained(folder).embeddings.position_embeddings.weight
        for folder in (students(name), teachers[name])
    )
    first = SEQ_LEN + 2  # behind the padding position
    assert own.shape == theirs.shape and torch.equal(own[first:], theirs[first:])
    assert not torch.equal(own[2:first], theirs[2:first])


def test_a_chat_template_is_exported_registered_and_pulled(teachers, text, tmp_path, teacher):
    """What an export writes, the registry takes: one list."""
    folder, files = teachers["chat-template"], ["chat_template.jinja", "additional_chat_templates/tool.jinja"]
    stage = {"name": "small", "teacher": str(folder), "student": {"layers": 1, "hidden": 24}, **STAGE}
    data = {"text": str(text), "tokenizer": str(folder), "seq_len": 32, "held_out": 0.1}
    path = write_recipe(tmp_path / "odd.yaml", tmp_path, [stage], data=data)
    work = tmp_path / "work"
    assert cli.main(["run", str(path), "--launcher", "inline", "--workdir", str(work)]) == 0
    assert cli.main(["pull", "models:/odd-small@newest", str(tmp_path / "out"), "--workdir", str(work)]) == 0
    assert set(files) <= set(model_files(tmp_path / "out"))
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {
        "default": "{{ messages }}",
        "tool": "{{ tools }}",
    }
    (tmp_path / "out" / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="never a pickle"):
        model_files(tmp_path / "out")


@pytest.mark.parametrize("name", REFUSED)
def test_check_and_run_refuse_with_the_same_line(name, teacher, shards, tmp_path, capsys):
    change, sentence = REFUSED[name]
    folder = tmp_path / "teacher"
    plain(folder, teacher)
    change(folder)
    stage = {"name": "only", "teacher": str(folder), "student": {"layers": 1, "hidden": 24}, **STAGE}
    path = write_recipe(tmp_path / "odd.yaml", shards, [stage])
    said = []
    for verb in (["check"], ["run", "--launcher", "inline", "--workdir", str(tmp_path / "work")]):
        capsys.readouterr()
        assert cli.main([verb[0], str(path), *verb[1:]]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("minilm: ")])
    assert said[0] == said[1]
    ((line,), _) = said
    assert line.startswith(f"minilm: error: {path}: stage only: " + sentence.replace("«folder»", str(folder)))
    assert len(line) < 700 and not (tmp_path / "work" / "stages").exists()


def test_thirty_four_kinds_are_tried_and_every_family():
    assert len(SOUND) >= 34 and len(REFUSED) >= 25 and set(FAMILIES) <= {kind for kind, *_ in SOUND.values()}


def test_tokens_that_were_added_without_resizing_the_model_are_named(teacher, text, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["[brand]", "[price]"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stage = {"name": "only", "teacher": str(teacher), "student": {"layers": 1, "hidden": 24}, **STAGE}
    data = {"text": str(text), "tokenizer": str(tmp_path / "tokenizer"), "seq_len": 32, "held_out": 0.1}
    path = write_recipe(tmp_path / "odd.yaml", tmp_path, [stage], data=data)
    assert cli.main(["check", str(path)]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "stage only: the data's vocabulary has 63 tokens, the teacher knows 61; tokens were added to the tokenizer "
            f"in {tmp_path / 'tokenizer'} ('[brand]', '[price]') and the model was not resized: give the tokenizer "
            "without them, or resize the teacher (resize_token_embeddings), train it, and save both"
        )
    )
