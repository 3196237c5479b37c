"""Probes: what they measure, the same for any number of workers, and nothing of the training depends on them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from minilm.model.export import weights_digest
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.embed import cosine_similarity
from minilm.orchestrator.evaluation.probes.agreement import LinearCka, Neighbours
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.evaluation.probes.evaluator import (
    HeldOutPass,
    evaluator_class,
    make_evaluators,
    measure,
)
from minilm.orchestrator.evaluation.probes.texts import Similarity
from minilm.orchestrator.evaluation.probes.vectors import pooled, row_vectors
from minilm.orchestrator.evaluation.sources import Source, head_of
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.feed.corpora import open_held_out
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import ProbeSpec, StageSpec
from minilm.orchestrator.train.build import build_distiller
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.conftest import make_embedder
from tests.eval_data import write_sst2, write_stsb
from tests.support import describe_folder, make_spec

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    write_sst2(root)
    write_stsb(root, glue=False)
    return root


def probes(tasks: Path, every: int | None = 4) -> tuple[ProbeSpec, ...]:
    return (
        ProbeSpec("knn", every),
        ProbeSpec("cka", every),
        ProbeSpec("stsb-embed", every, str(tasks)),
        ProbeSpec("linear-sst2", None, str(tasks)),
    )


def measured(spec: StageSpec) -> list[tuple[int, dict[str, float]]]:
    return [(p.step, p.metrics) for p in read_all_metrics(StageFolder(Path(spec.folder)).heldout_metrics)]


def digest(spec: StageSpec) -> str:
    return weights_digest(StageFolder(Path(spec.folder)).student("small"))


def test_probes_are_logged_by_step_and_change_no_weight_whoever_computes_them(
    documents, teacher, tmp_path, tasks
):
    """`documents` have padding. Two workers log the same bits as one."""
    without = make_spec(documents, teacher, tmp_path / "without", held_out_rows=10, eval_every=6)
    alone = replace(without, folder=str(tmp_path / "alone"), evaluate=probes(tasks))
    shared = replace(alone, folder=str(tmp_path / "shared"))
    assert run_stage(without) and run_stage(alone)
    assert worker_pool.join(worker_pool.start(shared, 2)) == [0, 0], worker_pool.log(shared)
    assert digest(without) == digest(alone) == digest(shared)
    points = dict(measured(alone))
    assert list(points) == [0, 4, 6, 8, 12]
    divergence = {"small/heldout/attention", "small/heldout/value"}
    at = {
        step: {key.removeprefix("small/heldout/probe/") for key in metrics if key not in divergence}
        for step, metrics in points.items()
    }
    every_four = {
        f"{name}{end}" for name in ("knn", "cka", "stsb-embed") for end in ("", "/share-of-teacher")
    }
    at_the_ends = every_four | {"linear-sst2", "linear-sst2/share-of-teacher"}
    assert at == {0: at_the_ends, 4: every_four, 6: set(), 8: every_four, 12: at_the_ends}
    assert [step for step, metrics in points.items() if divergence <= metrics.keys()] == [0, 6, 12]
    assert points[12]["small/heldout/probe/cka"] != points[0]["small/heldout/probe/cka"]
    assert measured(shared) == measured(alone)
    assert [(s, m) for s, m in measured(without)] == [
        (step, {key: m[key] for key in m if key in divergence})
        for step, m in measured(alone)
        if step in (0, 6, 12)
    ]


def given(spec: StageSpec) -> HeldOutPass:
    return HeldOutPass(build_distiller(spec, ALONE.device), open_held_out(spec.data), 8, 4, None, ALONE)


def test_a_row_of_several_documents_has_the_vector_of_its_first(masked, teacher, tmp_path):
    held_out = given(make_spec(masked, teacher, tmp_path))
    encoder, (corpus,) = held_out.distiller.teacher, held_out.corpora
    batch = corpus.rows.read(range(min(8, corpus.rows.num_rows)))
    assert (batch.ends.sum(1) > 1).any()
    firsts = [
        row[: int(ends.nonzero()[0]) + 1] for row, ends in zip(batch.input_ids, batch.ends, strict=True)
    ]
    with torch.no_grad():
        found = row_vectors(encoder, held_out)
        wanted = np.concatenate([pooled(encoder, row[None], None).numpy() for row in firsts])
    assert found.shape == wanted.shape  # in the order of their lengths, within a micro-batch
    nearest = np.abs(found[:, None] - wanted[None]).max(axis=2)
    assert (nearest.min(axis=0) < 1e-4).all() and (nearest.min(axis=1) < 1e-4).all()


@pytest.mark.parametrize("objective", ["hidden-relation", "embedding"])
def test_where_all_of_the_model_is_trained_the_similarity_is_that_of_the_task(
    objective, shards, teacher, tmp_path, tasks
):
    """Of an objective that reads more than the tap, vectors are those of `minilm evaluate`: the model's own in a stage
    of embeddings, here by its first token and a dense layer."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    if objective == "embedding":
        make_embedder(folder, pooling="cls", dense=64)
    probes = (ProbeSpec("stsb-embed", None, str(tasks)),)
    spec = make_spec(shards, folder, tmp_path, objective={"name": objective}, evaluate=probes)
    world, similarity = given(spec), make_evaluators(spec)[1]
    assert isinstance(similarity, Similarity)
    with torch.no_grad():
        mine = similarity.score(world.distiller.teacher, world)
        assert similarity.run(world)["small"].keys() == {
            "probe/stsb-embed",
            "probe/stsb-embed/share-of-teacher",
        }
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head = head_of(Source("teacher", "folder", str(folder)))
    options = {"tokens": 256, "batch": 64, "device": ALONE.device}
    theirs = cosine_similarity(model, head, tokenizer, TASKS["stsb-embed"], tasks, **options)
    # 24 pairs, some of a sentence with itself, whose cosines differ by rounding: an order among these is worth 2e-4
    assert mine == pytest.approx(theirs["spearman_dev"], abs=2e-3)
    at_the_tap = make_spec(shards, folder, tmp_path, evaluate=probes)
    with torch.no_grad():
        tapped = make_evaluators(at_the_tap)[1].score(given(at_the_tap).distiller.teacher, world)
    assert abs(tapped - mine) > 1e-2


def test_agreement_is_one_with_itself_and_blind_to_rotation_and_scale():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 12))
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    for kind in (Neighbours, LinearCka):
        assert kind.agreement(vectors, vectors) == pytest.approx(1.0)
        assert kind.agreement(vectors, 3 * vectors @ rotation + 5) == pytest.approx(1.0)
        noisy = [
            kind.agreement(vectors, vectors + s * rng.normal(size=vectors.shape)) for s in (0.1, 1.0, 9.0)
        ]
        assert 1 > noisy[0] > noisy[1] > noisy[2] > 0
    assert Neighbours.agreement(vectors[:1], vectors[:1]) == 0.0  # a single row has no neighbour
    assert (
        Neighbours.agreement(vectors[:9], rng.normal(size=(9, 5))) < 1
    )  # of few rows not all are neighbours
    assert LinearCka.agreement(vectors, np.ones((60, 4))) == 0.0  # all rows alike: nothing agrees


def test_rows_of_another_data_set_are_compared_where_a_probe_names_one(shards, documents, teacher, tmp_path):
    plain = make_spec(documents, teacher, tmp_path, evaluate=(ProbeSpec("knn"), ProbeSpec("cka")))
    named = replace(plain, evaluate=tuple(replace(probe, data=str(shards)) for probe in plain.evaluate))
    own = given(plain)
    elsewhere = replace(own, corpora=open_held_out(describe_folder(shards)))
    found = [
        measure(make_evaluators(spec)[1:], rows)
        for spec, rows in ((named, own), (plain, elsewhere), (plain, own))
    ]
    assert found[0] == found[1] != found[2]


def test_a_linear_classifier_tells_words_of_two_kinds_apart_and_a_teacher_without_a_value_is_refused(
    shards, teacher, tmp_path, tasks
):
    spec = make_spec(shards, teacher, tmp_path, evaluate=(ProbeSpec("linear-sst2", None, str(tasks)),))
    world, classifier = given(spec), make_evaluators(spec)[1]
    found = measure([classifier], world)
    assert world.distiller.students["small"].training
    assert found["small/heldout/probe/linear-sst2"] > 0.7 < classifier.teacher
    assert found["small/heldout/probe/linear-sst2/share-of-teacher"] == pytest.approx(
        found["small/heldout/probe/linear-sst2"] / classifier.teacher
    )
    classifier.teacher = -0.125
    with pytest.raises(UserError) as error:
        measure([classifier], world)
    assert str(error.value) == (
        "stage first: the teacher's own value of probe linear-sst2 is -0.125, of which no student can keep a share; "
        "leave the probe out, or take another teacher"
    )


def test_every_row_of_the_catalogue_names_a_class_and_a_task():
    for name, probe in PROBES.items():
        assert evaluator_class(name).__name__ == probe.evaluator.partition(":")[2]
        assert not probe.task or probe.task in TASKS
