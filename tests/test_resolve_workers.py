"""`compute.workers: auto` as numbers: GPUs, NUMA nodes, a cluster's places; a step's micro-batches bound it."""

import json

import pytest
import torch

from minilm.orchestrator import cli
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.launch import ray_launcher, resources
from minilm.orchestrator.launch.base import LaunchOptions, load_launcher
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.resolve import workers
from minilm.orchestrator.resolve.workers import workers_of
from minilm.orchestrator.stage.folder import RunFolder
from tests.support import NO_DATA, make_spec
from tests.test_driver_curriculum import write_recipe  # two stages of 8 rows, micro-batches of 4


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda number: monkeypatch.setattr(workers, "numa_nodes", lambda: [{n} for n in range(number)])


@pytest.fixture
def recipe(tmp_path, text, teacher):
    path = write_recipe(tmp_path, text, teacher)
    return lambda *changes: load_recipe(path, ["compute.workers=auto", *changes])


def test_a_machine_without_gpus_has_its_nodes(recipe, nodes):
    nodes(1)
    assert workers_of(recipe()) == (
        1,
        1,
        "compute.workers: auto is 1, because this machine has 1 NUMA node",
    )
    nodes(2)
    assert workers_of(recipe()) == (
        2,
        2,
        "compute.workers: auto is 2, because this machine has 2 NUMA nodes",
    )
    nodes(4)
    assert workers_of(recipe("stages.small.micro_batch=2"))[2] == (
        "compute.workers: auto is 2, because this machine has 4 NUMA nodes, and a step has 2 micro-batches"
    )
    assert workers_of(recipe("stages.assistant.micro_batch=8"))[2].endswith(
        "auto is 1, because this machine has 4 NUMA nodes, and a step has 1 micro-batch"
    )


def test_a_machine_with_gpus(recipe, nodes, monkeypatch):
    nodes(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = workers_of(recipe("compute.device=auto"))
    assert found[:2] == (2, 2) and found.reason.endswith("8 GPUs, and a step has 2 micro-batches")
    assert workers_of(recipe("compute.device=cpu")).reason.endswith("1 NUMA node")


def test_a_cluster_is_asked_when_the_run_is_there(recipe):
    assert workers_of(recipe(), joins=True) == (
        1,
        2,
        "compute.workers: auto is [1, 2] on a cluster, as many as it has places",
    )


def test_numbers_stay(recipe):
    assert workers_of(recipe("compute.workers=2")) == (2, 2, "")
    assert workers_of(recipe("compute.workers=[1, 2]"), joins=True) == (1, 2, "")


@pytest.mark.parametrize(("launcher", "says"), [("ray", 1), ("inline", 0)])
def test_a_run_says_what_auto_is(tmp_path, text, teacher, nodes, capsys, monkeypatch, launcher, says):
    nodes(2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ["--set", "compute.workers=auto", "--set", "compute.checkpoints=/dev/null/none"]
    command = ["run", str(write_recipe(tmp_path, text, teacher)), "--launcher", launcher]
    assert cli.main([*command, "--workdir", str(tmp_path / "work"), *options]) == 2
    assert capsys.readouterr().err.count("compute.workers: auto is 2, because") == says


def test_check_says_it_too_and_a_plan_is_for_so_many(tmp_path, text, teacher, nodes, capsys):
    nodes(2)
    recipe = str(write_recipe(tmp_path, text, teacher))
    assert cli.main(["check", recipe, "--set", "compute.workers=auto"]) == 0
    assert f"{recipe}: compute.workers: auto is 2, because" in capsys.readouterr().out
    assert cli.main(["plan", recipe, "--json", "--set", "compute.workers=auto"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["workers"] == 2


@pytest.mark.parametrize(("address", "joins"), [("10.0.0.1:6379", True), ("local", False), (None, False)])
def test_which_run_joins_a_cluster(monkeypatch, address, joins):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert load_launcher("ray").joins(address) is joins and not load_launcher("inline").joins(address)


def test_a_cluster_whose_places_can_not_be_counted(tmp_path, monkeypatch):
    """A CPU is a core, and a worker wants more of them than one."""
    monkeypatch.setattr(resources, "cluster_resources", lambda free=False: {"CPU": 64.0})
    options = LaunchOptions(RunFolder(tmp_path), "auto", (1, 8), 0.0, address="10.0.0.1:6379", auto=True)
    with pytest.raises(UserError) as refused:
        load_launcher("ray")(options, None).allocate(None, None)
    assert str(refused.value) == (
        "compute.workers is auto, and the Ray cluster has neither GPUs nor `trainer`s to count, only CPUs; give a "
        "number, as --set compute.workers=2, or start its nodes with `ray start --resources '{\"trainer\": 1}'`"
    )
    asked = []
    monkeypatch.setattr(ray_launcher, "wait_for_resources", lambda *given, **_: asked.append(given) or "GPU")
    for counted in ({"CPU": 64.0, "trainer": 2.0}, {"CPU": 64.0, "GPU": 1.0}):
        monkeypatch.setattr(resources, "cluster_resources", lambda free=False, counted=counted: counted)
        load_launcher("ray")(options, None).allocate(make_spec(NO_DATA, tmp_path, tmp_path), None)
    assert asked == [("auto", 1)] * 2, "from one worker on"
