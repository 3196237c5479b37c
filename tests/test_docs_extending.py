"""The five examples of docs/extending.md do what the page says: each is added as it stands there, and used."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from minilm.data.builder.build import import_data
from minilm.data.sources import plugin
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.catalogue import OBJECTIVES
from minilm.model.loss.objective import TERMS, Objective
from minilm.orchestrator import cli
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.launch import base
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import ProbeSpec
from minilm.orchestrator.worker.loop import run_stage
from tests.support import make_spec
from tests.test_driver_curriculum import write_recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
FAMILY, TERM, SOURCE, LAUNCHER, PROBE = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
)


def execute(example: str, module: str = "example") -> dict:
    names = {"__name__": module}
    exec(compile(example, str(PAGE), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """What an example adds is gone after its test."""
    for table in (FAMILIES, TERMS, OBJECTIVES, base.LAUNCHERS, PROBES):
        for key in list(table):
            monkeypatch.setitem(table, key, table[key])
    before = [(table, set(table)) for table in (FAMILIES, TERMS, OBJECTIVES, base.LAUNCHERS, PROBES)]
    yield
    for table, keys in before:
        for key in set(table) - keys:
            del table[key]


def encoder(architecture: str, layers: int) -> TappedEncoder:
    config = AutoConfig.for_model(
        architecture, vocab_size=40, hidden_size=16, num_attention_heads=4, max_position_embeddings=20
    )
    return TappedEncoder(build_student(config, layers=layers, hidden=16, seed=layers), layers)


def loss(architecture: str, objective: str) -> torch.Tensor:
    distiller = Distiller(
        encoder(architecture, 3), {"s": encoder(architecture, 2)}, Objective.named(objective)
    )
    ids = torch.arange(2, 22)[None]
    output = distiller.teacher_forward(ids, None)
    return distiller.term_sums("s", output, ids, None).sum()


def test_a_family(tmp_path):
    execute(FAMILY)
    assert loss("ernie", "minilm").requires_grad


def test_an_objective_term(monkeypatch):
    module = type(sys)("example")
    monkeypatch.setitem(sys.modules, "example", module)
    execute(TERM)
    assert 0 < float(loss("bert", "cosine").detach()) < 2


def test_a_data_source_with_an_option_of_its_own(tmp_path, teacher, monkeypatch, capsys):
    site = tmp_path / "site"
    info = site / "dashes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "dashes_example.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dashes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minilm.sources]\ndashes = dashes_example\n")
    monkeypatch.syspath_prepend(site)
    plugin.find_source.cache_clear()
    text = tmp_path / "a.txt"
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"]
    texts = (" ".join(words[i % 10 :] + words[: i % 7] + words[: i % 4]) for i in range(60))
    text.write_text("\n***\n".join(texts))
    by_hand = import_data(
        [text], str(teacher), tmp_path / "one", source="dashes", options={"separator": "***"}, seq_len=16
    )
    assert by_hand.documents == 60
    command = ["data", "import", str(text), "--from", "dashes", "--tokenizer", str(teacher), "--out"]
    options = ["--option", "separator='***'", "--held-out", "0", "--processes", "1", "--seq-len", "16"]
    assert cli.main([*command, str(tmp_path / "two"), *options]) == 0
    one, two = (
        json.loads((tmp_path / name / "report" / "report.json").read_text()) for name in ("one", "two")
    )
    assert one["documents"] == two["documents"] == 60
    assert cli.main([*command, str(tmp_path / "three"), "--option", "seperator=x"]) == 2
    assert "source 'dashes' has no option 'seperator'; allowed: separator" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "three"), "--option", "separator"]) == 2
    assert "--option: given 'separator'; allowed: KEY=VALUE" in capsys.readouterr().err

    recipe = write_recipe(tmp_path, text, teacher)
    values = yaml.safe_load(recipe.read_text())
    values["data"] |= {"source": "dashes", "options": {"separator": "***"}, "seq_len": 16}
    recipe.write_text(yaml.safe_dump(values))
    few = [word for stage in ("assistant", "small") for word in ("--set", f"stages.{stage}.steps=5")]
    run = ["run", str(recipe), "--launcher", "inline", "--workdir", str(tmp_path / "work")]
    assert cli.main([*run, *few]) == 0
    report = json.loads((tmp_path / "work" / "data" / "report" / "report.json").read_text())
    assert report["documents"] == 60
    assert cli.main(["check", str(recipe), "--set", "data.source=dots"]) == 2
    assert "data: source 'dots' is not known; there are: dashes, fairseq" in capsys.readouterr().err
    plugin.find_source.cache_clear()
    sys.modules.pop("dashes_example", None)


@pytest.mark.slow
def test_a_launcher(tmp_path, text, teacher, monkeypatch, capsys):
    module = type(sys)("minilm.orchestrator.launch.process")
    vars(module).update(execute(LAUNCHER, module.__name__))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(base.LAUNCHERS, "process", "process:ProcessLauncher")
    recipe = write_recipe(tmp_path, text, teacher)
    few = [word for stage in ("assistant", "small") for word in ("--set", f"stages.{stage}.steps=5")]
    assert (
        cli.main(["run", str(recipe), "--launcher", "process", "--workdir", str(tmp_path / "work"), *few])
        == 0
    )
    assert "tiny-small v1" in capsys.readouterr().out


def test_a_probe(tmp_path, shards, teacher, monkeypatch):
    package, module = type(sys)("query_norm_example"), type(sys)("query_norm_example.probes")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(execute(PROBE, module.__name__))
    spec = make_spec(shards, teacher, tmp_path, evaluate=(ProbeSpec("query-norm", 4),))
    assert run_stage(spec)
    points = read_all_metrics(tmp_path / "heldout.jsonl")
    assert [point.step for point in points] == [0, 4, 8, 12]
    first, *_, last = (point.metrics["small/heldout/probe/query-norm"] for point in points)
    assert 0 < first != last
    assert {"small/heldout/attention", "small/heldout/value"} < set(points[-1].metrics)
