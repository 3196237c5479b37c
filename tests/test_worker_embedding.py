"""A stage that trains vectors of sentences: the same bits whatever happens to it, and a student that can search."""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from minilm.data.builder.build import build
from minilm.data.format.manifest import load_manifest
from minilm.model.distiller import Distiller
from minilm.model.encoder.sentence_head import load_head
from minilm.model.encoder.sentence_layout import read_layout
from minilm.model.export import weights_digest
from minilm.orchestrator import cli
from minilm.orchestrator.driver.made_starts import with_made_starts
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.embed import vectors_of
from minilm.orchestrator.evaluation.sources import Source, head_of
from minilm.orchestrator.evaluation.sources import build as load_source
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.train.build import build_distiller
from minilm.orchestrator.train.start_share import StartShares
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.conftest import WORDS, make_embedder
from tests.support import make_spec


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 30))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of four sentences."""
    written, path = sentences(400, seed=0), tmp_path_factory.mktemp("sentences") / "text.txt"
    path.write_text("\n\n".join(" ".join(written[i : i + 4]) for i in range(0, len(written), 4)))
    return path


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A teacher of sentence-transformers whose dense layer makes vectors of 64 numbers."""
    return make_embedder(shutil.copytree(teacher, tmp_path_factory.mktemp("embedder") / "bert"), dense=64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, text: Path, embedder: Path) -> Path:
    out = tmp_path_factory.mktemp("rows") / "sentences"
    build([text], str(embedder), out, seq_len=32, packing="sentence", held_out=0.1, processes=1)
    assert load_manifest(out).packing == "sentence"
    return out


def job(rows: Path, teacher: Path, folder: Path, **changes: object) -> StageSpec:
    terms = [
        {"term": "cosine_distance", "name": "cosine_distance", "dims": 64},
        {"term": "cosine_distance", "name": "cosine_distance_16", "dims": 16},
        {"term": "similarity", "name": "similarity", "weight": 0.5},
    ]
    spec = make_spec(rows, teacher, folder, objective={"name": "embedding", "relations": terms}, **changes)
    student = StudentSpec("small", 2, 48, 4, 192, 0.1, "teacher-layers")
    return replace(spec, students=(student,))


def embedded(folder: Path, texts: list[str]) -> torch.Tensor:
    source = Source("it", "folder", str(folder))
    options = {"tokens": 32, "batch": 16, "device": torch.device("cpu")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.from_numpy(vectors_of(load_source(source, 0), head_of(source), tokenizer, texts, **options))


def test_killed_and_finished_by_two_workers_a_stage_ends_with_the_same_bits(rows, embedder, tmp_path):
    whole = job(rows, embedder, tmp_path / "whole")
    whole = replace(whole, students=(replace(whole.students[0], start_share=0.3),))
    assert run_stage(whole)
    killed = replace(whole, folder=str(tmp_path / "killed"))
    assert worker_pool.kill_at(killed, 1, rank=0, step=7) == [-signal.SIGKILL], worker_pool.log(killed)
    assert worker_pool.join(worker_pool.start(killed, 2)) == [0, 0], worker_pool.log(killed)
    done = [json.loads(StageFolder(Path(spec.folder)).done.read_text()) for spec in (whole, killed)]
    assert all(done[0][key] == done[1][key] for key in ("students", "ledger", "data", "steps"))
    digests = [weights_digest(StageFolder(Path(spec.folder)).student("small")) for spec in (whole, killed)]
    assert digests[0] == digests[1]  # the dense layer's too
    curve = read_all_metrics(StageFolder(Path(whole.folder)).heldout_metrics)
    names = [f"small/heldout/{name}" for name in ("cosine_distance", "cosine_distance_16", "similarity")]
    assert [set(point.metrics) for point in curve] == [set(names)] * 2
    assert 0 < curve[-1].metrics[names[0]] < curve[0].metrics[names[0]] < 2


@pytest.mark.parametrize("init", ["teacher-layers", "teacher-pca", "random"])
def test_a_new_dense_layer_turns_the_start_towards_the_teacher(init, rows, embedder, tmp_path):
    student = StudentSpec("small", 2, 24, 4, 96, 0.0, init)
    spec = replace(job(rows, embedder, tmp_path), students=(student,))
    made = with_made_starts(spec)
    if init == "random":  # there is nothing to keep
        assert made == spec
        return
    folder = Path(made.students[0].start)
    inode = (folder / "model.safetensors").stat().st_ino
    assert with_made_starts(spec) == made
    assert (folder / "model.safetensors").stat().st_ino == inode  # made once
    layout = read_layout(folder, 24)
    assert layout is not None
    weight = load_head(folder, layout).linear[0].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(24), rtol=0, atol=1e-5)  # cosines stay
    texts = sentences(60, seed=3)
    distance = 1 - (embedded(folder, texts) * embedded(embedder, texts)).sum(dim=1).mean().item()
    assert distance < 0.8  # 1 if drawn at random
    if init == "teacher-layers":
        assert made.students[0].start_digest == weights_digest(folder)


def test_weights_between_start_and_end_are_measured_and_exported(rows, embedder, tmp_path):
    plain = job(rows, embedder, tmp_path / "plain", steps=4)
    shared = replace(
        plain,
        folder=str(tmp_path / "shared"),
        students=(replace(plain.students[0], start_share=0.25),),
    )
    start = trained_state(build_distiller(plain, torch.device("cpu")))
    assert run_stage(plain) and run_stage(shared)
    end, between = (StageFolder(Path(spec.folder)).student("small") for spec in (plain, shared))
    ends, found = load_file(end / "model.safetensors"), load_file(between / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], ends[name])}
    assert len(moved) > 20
    for name, tensor in found.items():  # training was the same: it does not see the share
        expected = start[name] * 0.25 + ends[name] * 0.75 if name in moved else ends[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    assert (
        "| Share of the start in the weights | 0.25 of teacher-layers |"
        in (between / "README.md").read_text()
    )

    folder = StageFolder(Path(shared.folder))
    measured = read_all_metrics(folder.heldout_metrics)
    digest = weights_digest(between)
    folder.done.unlink()
    shutil.rmtree(between)
    other_start = replace(shared.students[0], init="random")  # as if it could not be made again
    assert run_stage(replace(shared, students=(other_start,)))  # the last checkpoint has start and end
    assert weights_digest(between) == digest

    after = StudentSpec("small", 2, 48, 4, 192, 0.1, "x/y", str(between), digest)
    again = replace(plain, folder=str(tmp_path / "again"), students=(after,), steps=1)
    assert run_stage(again)
    first = read_all_metrics(StageFolder(Path(again.folder)).heldout_metrics)[0].metrics
    assert first == pytest.approx(measured[-1].metrics, rel=1e-5)


def test_a_share_is_of_its_own_student_and_of_nothing_that_started_at_random(rows, teacher, tmp_path):
    names = ("kept", "other")
    spec = make_spec(rows, teacher, tmp_path, objective={"name": "value-mse"})
    spec = replace(spec, students=tuple(StudentSpec(n, 2, 24, 4, 96, 0.0, "teacher-layers") for n in names))
    distiller = build_distiller(spec, torch.device("cpu"))
    shares = StartShares((replace(spec.students[0], start_share=0.25), spec.students[1]), distiller)
    parameters = {f"{n}/{key}": p for n in names for key, p in distiller.trained_parameters(n).items()}
    start = {key: p.detach().clone() for key, p in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    trained = {key: p.detach().clone() for key, p in parameters.items()}
    with pytest.raises(OSError, match="in the midst"), shares.applied():
        for key, parameter in parameters.items():
            moved = key.startswith("kept/") and not key.startswith("kept/projection.")
            expected = start[key] + 0.75 if moved else trained[key]
            torch.testing.assert_close(parameter.detach(), expected)
        raise OSError("in the midst")
    assert all(torch.equal(parameters[key], value) for key, value in trained.items())
    assert {key.split(".")[0] for key in parameters} >= {"kept/projection", "other/projection"}


def trained_state(distiller: Distiller) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in distiller.students["small"].trained_parameters().items()}


def test_a_teacher_whose_vectors_overflow_is_named_by_the_run(rows, embedder, tmp_path):
    """Its start is made before, and must not fail on such vectors."""
    broken = shutil.copytree(embedder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.2.output.LayerNorm.weight"] *= 3e38
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    student = StudentSpec("small", 2, 24, 4, 96, 0.0, "teacher-layers")
    spec = replace(job(rows, broken, tmp_path), students=(student,))
    with pytest.raises(UserError, match="teacher .* not finite"):
        run_stage(with_made_starts(spec))


def test_queries_of_the_student_find_documents_of_the_teacher(rows, embedder, tmp_path):
    """Asymmetric search: the space is the teacher's, because the dense layer is inside the exported folder. The
    student goes on from the teacher itself, dense layer included: few steps of a tiny model teach nothing."""
    spec = job(rows, embedder, tmp_path, steps=2, peak_lr=1e-4)
    start = StudentSpec("small", 3, 48, 4, 192, 0.0, "x/y", str(embedder), weights_digest(embedder))
    assert run_stage(replace(spec, students=(start,)))
    folder = StageFolder(tmp_path).student("small")
    documents = sentences(60, seed=1)
    queries, index = embedded(folder, documents), embedded(embedder, documents)
    assert queries.shape == index.shape == (60, 64)
    assert torch.equal((queries @ index.T).argmax(dim=1), torch.arange(60))
    distance = 1 - (queries * index).sum(dim=1).mean().item()
    heldout = read_all_metrics(StageFolder(tmp_path).heldout_metrics)[-1].metrics
    assert 0 < distance < 0.05
    assert heldout["small/heldout/cosine_distance"] == pytest.approx(distance, rel=0.7)  # of other texts
    layout = read_layout(folder, 48)
    assert layout is not None
    batch = AutoTokenizer.from_pretrained(folder)(documents[:3], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    ours = load_head(folder, layout)(states, batch["attention_mask"].bool())
    torch.testing.assert_close(ours, queries[:3], rtol=0, atol=1e-5)


def test_two_stages_chain_in_one_recipe(text, embedder, tmp_path, capsys):
    student = {"layers": 2, "hidden": 24}
    stage = {"teacher": str(embedder), "batch": 8, "steps": 4, "peak_lr": 1e-3, "warmup_steps": 1}
    stage |= {"held_out_rows": 8}
    stages = [
        stage | {"name": "relations", "student": student | {"name": "start"}},
        stage
        | {
            "name": "vectors",
            "objective": "embedding",
            "embedding": {"dims": [64, 32]},
            "student": student | {"name": "embedder", "init": "start"},
        },
    ]
    data = {
        "text": str(text),
        "tokenizer": str(embedder),
        "seq_len": 32,
        "packing": "sentence",
        "held_out": 0.1,
    }
    values = {"name": "two", "data": data, "stages": stages, "compute": {"micro_batch": 4, "threads": 1}}
    recipe, work = tmp_path / "two.yaml", tmp_path / "work"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    run = ["run", str(recipe), "--launcher", "inline", "--workdir", str(work)]
    assert cli.main(["check", str(recipe)]) == 0
    assert cli.main(run) == 0, capsys.readouterr().err
    start, made = (
        StageFolder(work / "stages" / stage).student(name)
        for stage, name in (("relations", "start"), ("vectors", "embedder"))
    )
    spec = StageSpec.from_json((work / "stages" / "vectors" / "stage.json").read_text())
    fitted = Path(spec.students[0].start)  # the same weights with a dense layer
    layout = read_layout(fitted, 24)
    assert layout is not None and [layer.outputs for layer in layout.dense] == [64]
    weights = [load_file(folder / "model.safetensors") for folder in (start, fitted)]
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())
    assert spec.students[0].start_digest == weights_digest(start)
    listed = [module["path"] for module in json.loads((made / "modules.json").read_text())]
    assert listed == ["", "1_Pooling", "2_Dense", "3_Normalize"] and not (start / "modules.json").exists()
    cards = [(folder / "README.md").read_text() for folder in (start, made)]
    assert "**Fine-tune it before use.**" in cards[0] and "**Use it as it is.**" in cards[1]
    assert f"| Started from | start (weights {weights_digest(start)[:12]}) |" in cards[1]
    assert embedded(made, ["time year."]).shape == (1, 64)
    assert "cosine_distance_32" in capsys.readouterr().out
    assert cli.main(run) == 0
    assert "every stage of two is done already" in capsys.readouterr().err
