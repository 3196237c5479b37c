"""`minilm rehearse`: the recipe for a few steps is the true one, every part is seen, the real run stays as it was."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from minilm.orchestrator.cli import main
from minilm.orchestrator.driver.rehearsal import play as playing
from minilm.orchestrator.driver.rehearsal import rehearse as rehearsing
from minilm.orchestrator.driver.rehearsal.inputs import Inputs
from minilm.orchestrator.driver.rehearsal.play import Ended, StageSeen, Watcher
from minilm.orchestrator.driver.rehearsal.recipe import STEPS, few_steps
from minilm.orchestrator.driver.rehearsal.report import Part, Rehearsal, StageRate
from minilm.orchestrator.driver.status_line import StatusLine
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import InfrastructureError, RecipeErrors, Stopped
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.processes import started
from minilm.orchestrator.system.signals import StopRequest
from tests.conftest import make_embedder
from tests.eval_data import write_sst2, write_stsb
from tests.test_driver_curriculum import finished, write_recipe  # noqa: F401 (a fixture)
from tests.test_recipe_library import FILES, LIBRARY

pytestmark = pytest.mark.timeout(900)


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


def small(recipe: Recipe, folder: Path, **inputs: Path) -> Recipe:
    """The rehearsal's recipe, by way of its file."""
    (folder / "rehearsal.yaml").write_text(yaml.safe_dump(few_steps(recipe, lambda name: name, **inputs)))
    return load_recipe(folder / "rehearsal.yaml")


@pytest.mark.parametrize("file", FILES)
def test_of_every_recipe_only_the_length_changes(file, tmp_path):
    recipe = load_recipe(LIBRARY / file)
    found = small(recipe, tmp_path)
    few = {"steps", "warmup_steps", "peak_lr", "decay_steps", "until", "held_out_rows"}
    for one, own in zip(found.stages, recipe.stages, strict=True):
        same = [{k: v for k, v in s.model_dump().items() if k not in few} for s in (one, own)]
        assert same[0] | {"eval_every": own.eval_every} == same[1]
        assert one.steps == STEPS
        rise = [stage.peak_lr / stage.warmup_steps for stage in (one, own)]
        assert rise[0] == pytest.approx(rise[1]), "the true first steps"
    assert (
        found.compute.workers == recipe.compute.workers
        and found.data.model_dump() == recipe.data.model_dump()
    )


def test_what_writes_elsewhere_or_ends_a_stage_early_goes(tmp_path, text, teacher):
    open_end = {"schedule": "wsd", "decay_steps": 10, "evaluate": [{"probe": "knn", "every": 10}]}
    open_end |= {"until": {"probe": "knn", "patience": 2}, "batch": 8, "steps": 400, "peak_lr": 1e-3}
    students = [{"name": "a", "layers": 1, "hidden": 24}, {"name": "b", "layers": 1, "hidden": 24, "ffn": 48}]
    first = {"name": "s", "teacher": str(teacher), "assistant": "auto", "students": students, **open_end}
    short = {"name": "t", "teacher": "a", "student": {"layers": 1, "hidden": 24}, "batch": 4, "steps": 1}
    short |= {"schedule": "constant", "peak_lr": 1e-3, "warmup_steps": 0}
    compute = {
        "micro_batch": 4,
        "checkpoints": "s3://bucket/place",
        "keep_every_steps": 100,
        "workers": [1, 2],
    }
    changes = {"stages": [first | {"warmup_steps": 40}, short], "compute": {**compute, "workers": 1}}
    changes |= {"evaluation": {"tasks": ["cola"], "data": "tasks", "seeds": 5}, "promote": {}}
    path = write_recipe(tmp_path, text, teacher, **changes, tracking={"per_head": True})
    found = small(load_recipe(path), tmp_path, tasks=tmp_path / "few")
    assert [stage.name for stage in found.stages] == ["s-assistant", "s", "t"]
    assert [(s.steps, s.warmup_steps, s.decay_steps) for s in found.stages] == [
        (8, 6, 1),
        (8, 6, 1),
        (1, 0, None),
    ]
    assert not any(stage.until for stage in found.stages)
    assert [item.probe for item in found.stages[1].evaluate] == ["knn"]
    assert (found.compute.checkpoints, found.compute.keep_every_steps, found.promote) == (None, None, None)
    assert (found.compute.checkpoint_every_steps, found.tracking.log_every, found.tracking.per_head) == (
        2,
        1,
        False,
    )
    section = found.evaluation
    assert section is not None and (section.data, section.seeds) == (str(tmp_path / "few"), 1)
    assert (section.train_rows, section.controls) == (16, False)


def test_what_is_read_is_the_real_data_set_or_a_part_of_the_text(tmp_path, text, teacher, shards):
    recipe = load_recipe(write_recipe(tmp_path, text, teacher))
    real, scratch = Workdir(tmp_path / "real"), RunFolder(tmp_path / "scratch")
    inputs = Inputs(recipe, real, scratch)
    inputs.take_sample()
    assert inputs.sample is not None and inputs.shards is None
    words = [json.loads(line)["text"] for line in inputs.sample.read_text().splitlines()]
    assert sorted(words) == sorted(text.read_text().strip().split("\n\n"))
    found = small(recipe, tmp_path, sample=inputs.sample)
    assert (found.data.text, found.data.seq_len) == ((str(inputs.sample),), recipe.data.seq_len)

    shutil.copytree(shards, real.data)
    real.run.write_text(json.dumps({"recipe": recipe.result_fields()}))
    inputs = Inputs(recipe, real, scratch)
    inputs.take_sample()
    assert (inputs.shards, inputs.sample) == (real.data, None)
    (corpus,) = small(recipe, tmp_path, shards=inputs.shards).data.corpora or ()
    assert corpus.shards == str(real.data)
    other = load_recipe(tmp_path / "tiny.yaml", ["data.seq_len=16"])
    assert Inputs(other, real, scratch).shards is None, "built otherwise"

    write_stsb(write_sst2(tmp_path / "tasks", train=500), glue=False)
    section = {"tasks": ["sst2", "stsb-embed"], "data": str(tmp_path / "tasks")}
    inputs = Inputs(load_recipe(changed(tmp_path / "tiny.yaml", evaluation=section)), real, scratch)
    inputs.take_tasks()
    assert inputs.tasks is not None
    assert len((inputs.tasks / "SST-2" / "train.tsv").read_text().splitlines()) == 101


def test_of_tasks_that_the_run_refuses_nothing_is_taken(tmp_path, text, teacher):
    section = {"tasks": ["squad2"], "data": str(tmp_path / "tasks")}
    recipe = load_recipe(write_recipe(tmp_path, text, teacher, evaluation=section))
    folder = tmp_path / "tasks" / "squad2"
    folder.mkdir(parents=True)
    passage = {"context": "It is red.", "qas": [{"id": "1", "question": "What?", "answers": []}]}
    sound = {"data": [{"paragraphs": []}, {"paragraphs": [{"context": "", "qas": []}, *[passage] * 9]}]}
    for content in (b"{", b"[]", b'{"data": []}', b"\xff", json.dumps(sound).encode()):
        for split in ("train", "dev"):
            (folder / f"{split}-v2.0.json").write_bytes(content)
        inputs = Inputs(recipe, Workdir(tmp_path / "real"), RunFolder(tmp_path / "scratch"))
        inputs.take_tasks()
        assert (inputs.tasks is not None) == (b"red" in content)
    (article,) = json.loads((inputs.tasks / "squad2" / "dev-v2.0.json").read_text())["data"]
    assert article["paragraphs"] == [passage] * 4


@pytest.mark.parametrize("end", ["kill", "time"])
def test_all_processes_of_the_run_are_ended_and_no_others(tmp_path, monkeypatch, end):
    """With a run that begins a process, and does not stop when it is asked to."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\ntrap '' TERM\nsleep 20 &\necho $! > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\nwait\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(playing.sys, "executable", str(program))
    monkeypatch.setattr(playing, "END_SECONDS", 0.1)
    begun = (tmp_path / "pid").exists
    stop = StopRequest()
    with subprocess.Popen(["sleep", "20"]) as other:

        def kill_when() -> bool:
            stop.requested = end == "time" and begun()
            return end == "kill" and begun()

        watcher, line = Watcher(RunFolder(tmp_path), []), StatusLine(quiet=True)
        ended = playing.play(
            [], os.environ, watcher, line, tmp_path / "log",
            stop=stop, deadline=math.inf, kill_when=kill_when,
        )  # fmt: skip
        assert (ended.exit_code, ended.stopped) == ((None, False) if end == "kill" else (-9, True))
        assert started(int((tmp_path / "pid").read_text())) is None
        assert other.poll() is None
        other.kill()


def test_only_a_run_that_went_on_from_its_checkpoint_has_resumed(tmp_path):
    watcher = Watcher(RunFolder(tmp_path), ["s"])
    watcher.seen["s"] = StageSeen(1, 0, {"one": 0, "two": 4})
    assert rehearsing.resumed(("s", 4), False, {"one"}, watcher, Ended(0)).ok
    watcher.seen["s"].first_steps["two"] = 0
    again = rehearsing.resumed(("s", 4), False, {"one"}, watcher, Ended(0))
    assert (again.ok, again.text) == (False, "killed in stage s with step 4 saved, went on at step 0")
    del watcher.seen["s"].first_steps["two"]
    assert rehearsing.resumed(("s", 4), False, {"one"}, watcher, Ended(10)).ok is False
    assert rehearsing.resumed(("s", 4), True, {"one"}, watcher, Ended(0)).ok
    assert rehearsing.resumed(None, False, set(), watcher, Ended(0)).ok is False


def test_the_report_and_what_it_comes_to():
    stages = (
        StageRate("a", 2, 1000.0, None, 10**9, 9 * 10**8, 1000, 990, 7200.0),
        StageRate("b", 0, None, 2000.0, None, 10**8, None, 80, 3600.0),
    )
    parts = (
        Part("training", True, "1 of 2 stages"),
        Part("export", False, ""),
        Part("evaluation", None, "none"),
    )
    report = Rehearsal("mine", 8, "rows", parts, stages, True, 60.0, "")
    text = report.text()
    assert "  training        seen      1 of 2 stages\n  export          NOT SEEN\n" in text
    assert "the whole recipe: at most 3h00m at these rates" in text and "about 1m00s of tokenizing" in text
    assert report.as_dict()["seconds"] == 10800.0
    with pytest.raises(Stopped, match=r"was stopped; not seen: export; it had 5 minutes \(--minutes\)"):
        rehearsing.check(report, Ended(3, stopped=True), 5.0)
    with pytest.raises(RecipeErrors, match="a line"):
        rehearsing.check(report, Ended(2, problems=["a line", "another"]), 5.0)
    with pytest.raises(
        InfrastructureError, match="has not shown: export; --keep leaves its folder, with run.log"
    ):
        rehearsing.check(report, Ended(0), 5.0)


def test_text_that_is_not_here_and_a_place_that_cannot_be_written(
    tmp_path, text, teacher, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["rehearse", str(write_recipe(tmp_path, tmp_path / "none.txt", teacher))]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "nothing is left"
    assert main(["rehearse", "tiny.yaml", "--workdir", "some/where/else"]) == 2
    assert not (tmp_path / "some").exists()
    (tmp_path / "runs").write_text("")
    assert main(["rehearse", str(write_recipe(tmp_path, text, teacher))]) == 2
    out, errors = capsys.readouterr()
    assert f"minilm: error: cannot rehearse in {tmp_path / 'runs'}: " in errors
    assert "; give another --workdir, beside which there is room" in errors and not out


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def rehearsed(capsys, recipe: Path, *options: str, code: int = 0) -> dict[str, Any]:
    assert main(["rehearse", str(recipe), "--json", "-q", *options]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_part_is_seen_and_the_real_run_its_registry_and_its_tracker_stay_as_they_were(
    finished,  # noqa: F811
    tmp_path,
    text,
    teacher,
    capsys,
    monkeypatch,  # noqa: F811
):
    """A recipe over the real run's data, one of whose teachers is in that run's own registry."""
    real = shutil.copytree(finished / "work", tmp_path / "runs" / "real")
    write_stsb(write_sst2(tmp_path / "tasks", train=32, dev=12), glue=False)
    recipe = write_recipe(tmp_path, text, teacher)
    stages = yaml.safe_load(recipe.read_text())["stages"]
    stages[1]["teacher"] = "models:/tiny-assistant@newest"
    evaluation = {"tasks": ["stsb-embed", "sst2"], "data": "tasks"}
    changed(recipe, stages=stages, evaluation=evaluation, promote={"max_drop": 0.5})
    before = everything(tmp_path)
    options = ["--launcher", "inline", "--workdir", str(real)]
    report = rehearsed(capsys, recipe, *options)
    assert everything(tmp_path / "runs" / "real") == {
        p: v for p, v in before.items() if p.startswith(str(real))
    }
    after = everything(tmp_path)
    assert after.keys() == before.keys(), "the scratch folder is gone"
    assert report["failed"] == [] and report["data"] == f"the data set in {real / 'data'}, in place"
    said = {part["name"]: part for part in report["parts"]}
    assert all(part["ok"] for part in report["parts"])
    assert said["training"]["text"] == "2 of 2 stages"
    assert said["registration"]["text"] == "tiny-assistant v1, tiny-small v1, in a scratch registry"
    assert said["evaluation"]["text"] == "stsb-embed, sst2, on a few rows; no gate"
    for stage in report["stages"]:
        assert stage["rate"] > 0 and stage["memory"] > stage["planned_memory"]
        assert stage["checkpoint"] == pytest.approx(
            stage["planned_checkpoint"], rel=0.5
        )  # of tensors of a few bytes
        assert stage["seconds"] == pytest.approx(40 * 8 * 32 / stage["rate"])
    assert report["seconds"] == pytest.approx(sum(stage["seconds"] for stage in report["stages"]))

    store = shutil.copyfile(
        real / "mlflow.db", tmp_path / "server.db"
    )  # a tracker of its own, with the same models
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    before = everything(tmp_path)
    assert rehearsed(capsys, recipe, *options)["failed"] == []
    after = everything(tmp_path)
    assert {p for p in after if after[p] != before[p]} <= {str(real.parent)}, "where the scratch folder was"


@pytest.mark.slow
def test_with_ray_an_assistant_by_rule_several_students_an_open_end_and_two_workers(
    tmp_path, text, teacher, capsys
):
    stage = {"batch": 8, "steps": 4000, "peak_lr": 1e-3, "warmup_steps": 40, "held_out_rows": 8}
    students = [
        {"name": "one", "layers": 1, "hidden": 24},
        {"name": "other", "layers": 1, "hidden": 24, "ffn": 48},
    ]
    ends = {"schedule": "wsd", "decay_steps": 10, "until": {"probe": "knn", "patience": 2}}
    ends["evaluate"] = [{"probe": "knn", "every": 10}]
    stages = [
        {"name": "s", "teacher": str(teacher), "assistant": "auto", "students": students, **stage, **ends}
    ]
    compute = {"micro_batch": 4, "threads": 1, "workers": 2}
    recipe = write_recipe(tmp_path, text, teacher, stages=stages, compute=compute)
    report = rehearsed(capsys, recipe, "--workdir", str(tmp_path / "real"), "--keep")
    assert report["failed"] == [] and report["at_most"]
    (resumed,) = [part["text"] for part in report["parts"] if part["name"] == "kill and resume"]
    assert re.search(r"killed in stage s-assistant with step \d saved, went on at step \d", resumed)
    assert [(stage["stage"], stage["workers"]) for stage in report["stages"]] == [
        ("s-assistant", 2),
        ("s", 2),
    ]
    kept = load_recipe(Path(report["kept"]) / "rehearsal.yaml")
    assert kept.compute.workers == (2, 2) and not (tmp_path / "real").exists()


@pytest.mark.slow
def test_stages_of_vectors(tmp_path, text, teacher, capsys):
    folder = shutil.copytree(teacher, tmp_path / "embedder")
    make_embedder(folder)
    common = {
        "teacher": str(folder),
        "batch": 8,
        "steps": 40,
        "peak_lr": 1e-3,
        "warmup_steps": 4,
        "held_out_rows": 8,
    }
    shape = {"layers": 2, "hidden": 48}
    stages = [
        {"name": "relations", "student": {"name": "start", **shape}, **common},
        {
            "name": "vectors",
            "objective": "embedding",
            "student": {"name": "end", "init": "start", **shape},
            **common,
        },
    ]
    data = {
        "text": str(text),
        "tokenizer": str(folder),
        "seq_len": 32,
        "held_out": 0.1,
        "packing": "document",
    }
    recipe = write_recipe(tmp_path, text, teacher, stages=stages, data=data)
    report = rehearsed(capsys, recipe, "--workdir", str(tmp_path / "real"), "--launcher", "inline")
    assert report["failed"] == []


@pytest.mark.slow
def test_a_time_limit_ends_it_in_good_order_and_a_refusal_is_the_runs_own(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    options = ["--launcher", "inline", "--workdir", str(tmp_path / "runs" / "real")]
    began = time.monotonic()
    assert main(["rehearse", str(recipe), "--minutes", "0.001", *options]) == 3
    out, errors = capsys.readouterr()
    assert time.monotonic() - began < 300
    assert "the whole recipe: unknown, as no stage was measured" in out and "training        NOT SEEN" in out
    assert "minilm: stopped: the rehearsal was stopped; not seen: inputs, training, checkpoint" in errors
    assert not (tmp_path / "runs").exists()
    assert main(["rehearse", str(recipe), "--set", "stages.assistant.teacher_layer=9", *options]) == 2
    out, errors = capsys.readouterr()
    assert "minilm: error: tiny: stage assistant: layer 9 does not exist; bert has layers 1 to 3" in errors
    assert out == ""
    assert os.listdir(tmp_path) == ["tiny.yaml"]  # noqa: PTH208
