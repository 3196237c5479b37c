"""A student that goes on from an exported model: its shape, all its weights, and the same bits when it is resumed."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from minilm.model.compatibility import fit_student
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.initialize import INITIALIZATIONS
from minilm.model.encoder.shape import load_config, plain_config, shape_of
from minilm.model.encoder.warm_start import load_start
from minilm.model.errors import ModelError
from minilm.model.export import weights_digest
from minilm.model.loss.objective import Objective
from minilm.orchestrator import cli
from minilm.orchestrator.recipe import fields
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.worker.loop import run_stage
from tests.conftest import make_teacher
from tests.odd_teachers import plain
from tests.support import make_spec


def test_the_recipe_knows_the_initialisations_of_the_model():
    assert fields.INITIALIZATIONS == INITIALIZATIONS


def test_every_weight_is_taken_and_only_the_dropout_is_new(teacher):
    started = load_start(teacher, dropout=0.25, head=False, seed=1)
    weights = load_file(teacher / "model.safetensors")
    assert all(started.state_dict()[name].equal(tensor) for name, tensor in weights.items())
    assert started.training and started.config.hidden_dropout_prob == 0.25
    assert replace(shape_of(started.config), has_head=None) == replace(
        shape_of(load_config(teacher)), has_head=None
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_start_of_any_family_keeps_its_config_and_computes_what_it_did(kind, teacher, tmp_path):
    """One of EuroBERT's has two heads of keys and values for four of queries."""
    plain(tmp_path / kind, teacher, kind)
    config = load_config(tmp_path / kind)
    started = load_start(tmp_path / kind, dropout=0.25, head=False, seed=1)
    own = plain_config(started.config)
    assert all(getattr(own, rate) == 0.25 for rate in FAMILIES[kind].dropout)
    for rate in FAMILIES[kind].dropout:
        setattr(own, rate, getattr(config, rate))
    own.architectures = config.architectures
    assert own.to_dict() == config.to_dict()
    ids = torch.arange(5, 15).reshape(2, 5)
    with torch.inference_mode():
        found, expected = (
            model.eval()(input_ids=ids).last_hidden_state
            for model in (started, AutoModel.from_pretrained(tmp_path / kind))
        )
    torch.testing.assert_close(found, expected)


def test_a_pooler_that_is_not_there_is_the_same_at_every_start(teacher, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    digests = []
    for _ in range(2):
        torch.rand(1)
        digests.append(weights_digest(load_start(folder, dropout=0.1, head=False, seed=5).state_dict()))
    assert digests[0] == digests[1]


def test_sizes_come_from_the_start_or_must_be_its_own(teacher, tmp_path):
    start = shape_of(load_config(make_teacher(tmp_path / "start", layers=2, hidden=24)))
    own = shape_of(load_config(teacher))

    def fit(**changes):
        sizes = {"layers": 2, "hidden": 24, "start": start, **changes}
        return fit_student("s", Objective.named("minilm"), own, **sizes)

    assert fit() == fit(ffn=96, heads=4) == start
    with pytest.raises(
        ModelError, match="'s': given layers: 3, ffn: 9, and .* has layers: 2, ffn: 96; give lay"
    ):
        fit(layers=3, ffn=9)
    with pytest.raises(
        ModelError, match="starts from a mpnet and learns from a bert; start from a model of the"
    ):
        fit(start=replace(start, architecture="mpnet"))
    with pytest.raises(ModelError, match="'s' has a vocabulary of 9 and the teacher of"):
        fit(start=replace(start, vocab_size=9))
    with pytest.raises(ModelError, match="the teacher has 4 heads and the student 2"):
        fit(start=replace(start, heads=2))


def test_a_start_that_is_not_here_is_told_by_check_and_passes(teacher, shards, tmp_path, capsys, monkeypatch):
    """A path counts from the recipe's folder; a registry is not asked."""
    stage = {
        "name": "small",
        "teacher": str(teacher),
        "batch": 8,
        "steps": 3,
        "peak_lr": 1e-3,
        "warmup_steps": 1,
    }
    path = tmp_path / "there" / "r.yaml"
    path.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    for init, note in [
        ("./none", f"given '{tmp_path}/there/none', but there is no such folder; give yours"),
        ("models:/a@b", ""),
    ]:
        student = {"layers": 1, "hidden": 30, "init": init}  # of 4 heads at least: those of the model count
        path.write_text(
            yaml.safe_dump(
                {"name": "r", "data": {"shards": str(shards)}, "stages": [stage | {"student": student}]}
            )
        )
        assert cli.main(["check", str(path), "--set", "compute.micro_batch=4"]) == 0
        said = capsys.readouterr().out
        assert f"not here: stage small, student small: init: {note}" in said
    recipe = load_recipe(path, ["compute.micro_batch=4", "stages.small.student.init=./other"])
    assert recipe.stages[0].students[0].starts_from == str(tmp_path / "other")


def started(shards: Path, teacher: Path, folder: Path, start: Path) -> StageSpec:
    student = StudentSpec("small", 2, 24, 4, 96, 0.1, "models:/mine@good", str(start), weights_digest(start))
    return replace(make_spec(shards, teacher, folder), students=(student,))


def test_training_goes_on_from_the_start_and_a_resumed_run_ends_with_the_same_bits(shards, teacher, tmp_path):
    assert run_stage(make_spec(shards, teacher, tmp_path / "before"))
    start = StageFolder(tmp_path / "before").student("small")
    whole = started(shards, teacher, tmp_path / "whole", start)
    assert StageSpec.from_json(whole.to_json()) == whole
    assert run_stage(whole)
    parts = replace(whole, folder=str(tmp_path / "parts"))
    folder = StageFolder(Path(parts.folder))

    def stop_after_four(step: int) -> None:
        if step == 4:
            folder.stop_request.touch()
            time.sleep(0.6)  # the loop looks for the request twice a second

    assert not run_stage(parts, on_step=stop_after_four)
    folder.stop_request.unlink()
    assert run_stage(parts)
    ended = [weights_digest(StageFolder(Path(spec.folder)).student("small")) for spec in (whole, parts)]
    assert ended[0] == ended[1] != weights_digest(start)
    card = (folder.student("small") / "README.md").read_text()
    assert f"| Started from | models:/mine@good (weights {weights_digest(start)[:12]}) |" in card
    first = read_all_metrics(StageFolder(tmp_path / "whole").heldout_metrics)[0].metrics
    last = read_all_metrics(StageFolder(tmp_path / "before").heldout_metrics)[-1].metrics
    assert first == pytest.approx(last)  # it begins where the other ended
