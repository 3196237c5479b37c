"""Models and controls are built, trained and scored: by seed alone, resumable, the same numbers in any order."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from minilm.model.errors import ModelError
from minilm.model.export import weights_digest
from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.evaluation import trials
from minilm.orchestrator.evaluation.batches import shuffled_batches
from minilm.orchestrator.evaluation.comparison import Comparison, Score, difference, score_all, share_of
from minilm.orchestrator.evaluation.fine_tune import check_head, with_head
from minilm.orchestrator.evaluation.protocols import PROTOCOLS, Setting
from minilm.orchestrator.evaluation.sources import Source, build, check_source, split_control
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.evaluation.trials import plan_trials, processes_for, run_trial, side_by_side
from tests.eval_data import write_cola, write_mnli, write_squad, write_sst2, write_stsb, write_xnli

CPU = torch.device("cpu")
QUICK = Setting(2e-3, 6, 32, 8)


@pytest.fixture
def own(teacher) -> Source:
    return Source("teacher", "folder", str(teacher))


def planned(source, task, data, **changes):
    """One trial with some values of the test's own."""
    protocol = next(p for p in PROTOCOLS.values() if task in p.tasks)
    (first, *_) = plan_trials([source], [(TASKS[task], protocol)], data, seeds=1, train_rows=None, device=CPU)
    return replace(first, **{"setting": QUICK, "precision": "float32"} | changes)


def run(source, task, data, folder, *, setting=QUICK, seed=0, train_rows=None):
    return run_trial(planned(source, task, data, setting=setting, seed=seed, train_rows=train_rows), folder)


def test_controls_are_written_with_a_shape():
    assert split_control("some/folder") == ("folder", "some/folder", None)
    assert split_control("random:package:a/b") == ("random", "package:a/b", None)
    assert split_control("layers:package:a/b:3x192") == ("layers", "package:a/b", (3, 192))
    assert split_control("random:x:L6-H192") == ("random", "x", (6, 192))
    for text in ("layers:folder", "random:", "layers:folder:3"):
        with pytest.raises(
            UserError, match=r"allowed: random:FOLDER, random:FOLDER:SHAPE and layers:FOLDER:SHAPE"
        ):
            split_control(text)


def test_controls_have_the_shape_and_no_distillation(teacher):
    random = Source("r", "random", str(teacher))
    one, same, other = (build(random, seed).state_dict() for seed in (0, 0, 1))
    whole = AutoModel.from_pretrained(teacher)
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in whole.state_dict().items()}
    cut = build(Source("l", "layers", str(teacher), (2, 24)), 0)
    assert (cut.config.num_hidden_layers, cut.config.hidden_size) == (2, 24)
    words = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(cut.state_dict()[words], whole.state_dict()[words][:, :24])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("config", "m is no model .no config.json in .*; give a transformers folder"),
        (
            "tokenizer",
            "m has no tokenizer .no tokenizer.json or vocabulary file in .*; save its tokenizer there with",
        ),
        (
            "weights",
            "m has no model.safetensors; give the folder that save_pretrained wrote",
        ),
        ("config cut", "m: cannot read .*/config.json .*; give a folder that save_pretrained wrote"),
        ("layers", "lacks 16 weights of a bert encoder"),
        ("weights cut", "cannot load the weights of|holds damaged safetensors|damaged; bring it again"),
        ("wide", "a hidden size of 96 cannot start from the teacher's 48"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused_at_once(tmp_path, teacher, kind, message):
    folder = tmp_path / "m"
    shutil.copytree(teacher, folder)
    gone = {"config": "config.json", "tokenizer": "tokenizer.json", "weights": "model.safetensors"}.get(kind)
    if gone:
        (folder / gone).unlink()
    elif kind == "layers":
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] += 1
        (folder / "config.json").write_text(json.dumps(config))
    elif kind.endswith("cut"):
        file = folder / ("config.json" if kind == "config cut" else "model.safetensors")
        file.write_bytes(file.read_bytes()[:100])
    source = (
        Source("m", "layers", str(folder), (2, 96)) if kind == "wide" else Source("m", "folder", str(folder))
    )
    with pytest.raises((UserError, ModelError), match=message):
        check_source(source)


def test_pooled_similarity_is_what_plain_transformers_gives(tmp_path, own, teacher):
    write_stsb(tmp_path, glue=False)
    found = run(own, "stsb-embed", tmp_path, tmp_path / "out", setting=Setting(0, 0, 256, 7))["metrics"]
    rows = [line.split("\t") for line in (tmp_path / "stsb" / "sts-test.csv").read_text().splitlines()]
    model, tokenizer = AutoModel.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)

    def vector(text):
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        mean = states[0].mean(dim=0)
        return (mean / mean.norm()).numpy()

    cosines = [float(vector(row[5]) @ vector(row[6])) for row in rows]
    assert found["spearman"] == pytest.approx(
        spearmanr(cosines, [float(row[4]) for row in rows]).statistic, abs=1e-3
    )
    assert set(found) == {"spearman", "pearson", "spearman_dev", "pearson_dev"}


def test_a_head_is_drawn_from_the_seed_and_the_rest_is_the_encoders(own):
    encoder = build(own, 0)
    before = torch.random.get_rng_state()
    one, same, other = (with_head(encoder, "classes", 3, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert weights_digest(one.bert.state_dict()) == weights_digest(encoder.state_dict())


def test_an_epoch_has_every_row_once_and_another_order_each_time():
    lengths = np.arange(100) % 13
    batches = shuffled_batches(lengths, 8, seed=3, epoch=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(100))
    assert [b.tolist() for b in batches] == [b.tolist() for b in shuffled_batches(lengths, 8, 3, 1)]
    assert [b.tolist() for b in batches] != [b.tolist() for b in shuffled_batches(lengths, 8, 3, 2)]


@pytest.mark.parametrize("task", ["sst2", "stsb", "mnli", "xnli", "squad2"])
def test_training_learns_each_kind_of_task(tmp_path, own, task):
    """Better than chance where the made-up labels can be learnt; of NLI and of STS-B the names are looked at."""
    data = tmp_path / "data"
    for write in (write_sst2, write_mnli, write_xnli, write_squad):
        write(data)
    write_stsb(data, glue=True)
    result = run(own, task, data, tmp_path / "out", setting=Setting(2e-3, 6, 40, 8, stride=8))
    found = result["metrics"]
    names = {
        "mnli": {"accuracy", "accuracy_mismatched"},
        "xnli": {"accuracy", "accuracy_de", "accuracy_en"},
        "stsb": {"spearman", "pearson"},
    }
    if task in names:
        assert set(found) == names[task]
    else:
        floor = {"sst2": ("accuracy", 0.8), "squad2": ("f1", 0.5)}[task]
        assert found[floor[0]] >= floor[1]
    assert result["curve"][-1][1] < result["curve"][0][1]


def test_a_trial_is_the_same_whatever_ran_before_and_is_not_run_twice(tmp_path, own, monkeypatch):
    data = write_sst2(tmp_path / "data")
    one = run(own, "sst2", data, tmp_path / "a", seed=1)
    torch.manual_seed(1234)
    np.random.seed(5)
    run(own, "sst2", data, tmp_path / "b", seed=0)
    other = run(own, "sst2", data, tmp_path / "b", seed=1)
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    monkeypatch.setattr(trials, "build", lambda *_: pytest.fail("it was there"))
    assert run(own, "sst2", data, tmp_path / "b", seed=1) == other


def test_processes_side_by_side_give_the_same_numbers_and_end_together(tmp_path, own):
    data = write_sst2(tmp_path / "data")
    few = [planned(own, "sst2", data, seed=seed) for seed in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = list(side_by_side(few, tmp_path / "a", 1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    endless = [
        planned(own, "sst2", data, seed=seed, setting=Setting(2e-3, 10**5, 32, 8)) for seed in range(2)
    ]
    with closing(side_by_side([*few, *endless], tmp_path / "b", 2)) as running:
        there = [next(running) for _ in few]
        for child in multiprocessing.active_children():
            child.kill()
        message = (
            "one of 2 processes with trials was killed, perhaps for want of memory; .*, with --parallel 1 one"
        )
        with pytest.raises(InfrastructureError, match=message):
            next(running)
    assert [r | {"seconds": 0} for r in here] == [r | {"seconds": 0} for r in there]
    assert len(list((tmp_path / "b" / "trials").iterdir())) == 2
    children = multiprocessing.active_children()
    for child in children:
        child.join(10)
    assert not multiprocessing.active_children()


def test_so_many_trials_at_once_as_cores_and_memory_allow(tmp_path, own, monkeypatch):
    data = write_sst2(tmp_path / "data")
    todo = [planned(own, "sst2", data, seed=seed) for seed in range(4)]
    monkeypatch.setattr(trials.os, "sched_getaffinity", lambda _: range(16))

    def at_once(free: int, *given) -> int:
        monkeypatch.setattr(trials.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return processes_for(given, tmp_path)

    assert at_once(1 << 40, *todo) == 4  # no more than there are
    assert (at_once(5 << 30, *todo), at_once(1 << 20, *todo)) == (3, 1)
    assert at_once(1 << 40, *(replace(trial, device="cuda") for trial in todo)) == 1
    monkeypatch.setattr(trials.os, "sched_getaffinity", lambda _: range(2))
    assert at_once(1 << 40, *todo) == 2


def test_a_folder_of_results_goes_on_in_its_precision(tmp_path, own, monkeypatch):
    data = write_stsb(write_sst2(tmp_path / "data"), glue=False)
    monkeypatch.setattr(trials, "choose_precision", lambda *_: "float32")
    tasks = [(TASKS["stsb-embed"], PROTOCOLS["embed-fast"]), (TASKS["sst2"], PROTOCOLS["glue-fixed"])]

    def precisions(folder: Path) -> list[str]:
        found = plan_trials([own], tasks, data, seeds=1, train_rows=None, device=CPU, results=folder)
        return [trial.precision for trial in found]

    run_trial(planned(own, "stsb-embed", data), tmp_path / "a")
    assert precisions(tmp_path / "a") == ["float32", "float32"]
    result = run_trial(planned(own, "sst2", data, precision="bfloat16"), tmp_path / "a")
    assert result["metrics"]["accuracy"] >= 0.8
    assert precisions(tmp_path / "a") == ["float32", "bfloat16"]  # without training it is always float32
    assert precisions(tmp_path / "b") == ["float32", "float32"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_evaluation_leaves_no_process_and_goes_on_to_the_same_numbers(tmp_path, teacher):
    data = write_cola(tmp_path / "data", glue=True, train=2000)
    command = [
        sys.executable,
        "-m",
        "minilm",
        "evaluate",
        str(teacher),
        f"random:{teacher}",
        "--tasks",
        "cola",
    ]
    command += ["--data", str(data), "--seeds", "3", "--json"]

    def scores(done: subprocess.CompletedProcess) -> list:
        return [json.loads(line)["scores"] for line in done.stdout.splitlines()]

    whole = [*command, "--out", str(tmp_path / "whole"), "--parallel", "1"]
    wanted = subprocess.run(whole, check=True, capture_output=True, text=True, timeout=600)
    command += ["--out", str(tmp_path / "killed"), "--parallel", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results, deadline = tmp_path / "killed" / "trials", time.monotonic() + 600
    while not list(results.glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the server that forks, and two that it forked
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]
    kept = {path.name for path in results.iterdir()}
    assert 0 < len(kept) < 6
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert scores(again) == scores(wanted) and kept <= {path.name for path in results.iterdir()}


def test_changed_data_or_weights_are_another_trial(tmp_path, own, teacher):
    data = write_sst2(tmp_path / "data")

    def keys(source):
        tasks = [(TASKS["sst2"], PROTOCOLS["glue-fixed"])]
        return [t.key for t in plan_trials([source], tasks, data, seeds=2, train_rows=None, device=CPU)]

    before = keys(own)
    assert len(set(before)) == 2
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    assert keys(Source("another name", "folder", str(copy))) == before
    assert set(keys(Source("teacher", "random", str(teacher)))).isdisjoint(before)
    write_sst2(data, train=66)
    assert set(keys(own)).isdisjoint(before)


def test_the_smallest_sets_get_most_seeds(tmp_path, own):
    data = write_cola(tmp_path, glue=False)
    tasks = [(TASKS["cola"], PROTOCOLS["glue-fixed"])]
    assert len(plan_trials([own], tasks, data, seeds=None, train_rows=None, device=CPU)) == 5
    assert PROTOCOLS["glue-fixed"].seeds_of(67_000) == 3
    grid = [(TASKS["cola"], PROTOCOLS["glue-minilm"])]
    assert len(plan_trials([own], grid, data, seeds=None, train_rows=None, device=CPU)) == 4 * 4 * 4


def make_score(model: str, scores: tuple[float, ...], task: str = "cola") -> Score:
    return Score(model, task, "glue-fixed", "matthews", scores, {}, QUICK, None, "data", 1.0)


def test_shares_and_differences_are_paired_by_seed():
    teacher, student = make_score("t", (0.8, 0.6, 0.7)), make_score("s", (0.4, 0.3, 0.35))
    share = share_of(teacher, student)
    assert (share.mean, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))  # though both vary by seed
    found = difference(student, make_score("r", (0.3, 0.2, 0.25)))
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    two = difference(make_score("a", (1.0, 3.0)), make_score("b", (0.0, 0.0)))
    assert two.high - two.mean == pytest.approx(12.706, abs=1e-2)  # Student's t of one degree of freedom
    assert share_of(make_score("t", (0.0,)), student) is None
    assert difference(make_score("a", (0.5,)), make_score("b", (0.4,))).low is None


def test_the_best_setting_is_taken_by_its_mean(tmp_path, own):
    data = write_cola(tmp_path, glue=True)
    tasks = [(TASKS["cola"], PROTOCOLS["glue-minilm"])]
    planned = plan_trials([own], tasks, data, seeds=2, train_rows=None, device=CPU)

    def value(trial):  # another setting has the best single seed
        if (trial.setting.learning_rate, trial.setting.epochs) == (3e-5, 4):
            return (0.5, 0.6)[trial.seed]
        return (0.9, 0.0)[trial.seed]

    def result(trial):
        names = ("task", "protocol", "train_rows", "data_digest", "seed")
        values = {name: getattr(trial, name) for name in names}
        metrics = {"matthews": value(trial), "accuracy": 0.1}
        return values | {"model": "m", "setting": trial.setting.as_dict(), "metrics": metrics, "seconds": 1.0}

    (score,) = score_all(map(result, planned))
    assert score.scores == (0.5, 0.6) and score.setting == Setting(3e-5, 4, 128, 32)
    assert "best mean over seeds on the reported dev set" in score.as_dict()["setting"]["chosen"]


def test_the_table_says_who_beats_the_control_and_who_does_not(own, teacher):
    sources = [own, Source("small", "folder", ""), Source("random:small", "random", "")]
    scores = [
        make_score("teacher", (0.8, 0.8)),
        make_score("small", (0.40, 0.42)),
        make_score("random:small", (0.10, 0.12)),
        make_score("small", (0.40, 0.42), "sst2"),
        make_score("random:small", (0.50, 0.30), "sst2"),
    ]
    text = Comparison(scores, sources, "teacher").text()
    assert ["small", "0.410", "±", "0.014", "51.2%", "[35.4%,"] in [
        line.split()[:6] for line in text.splitlines()
    ]
    assert "cola: small - random:small = +0.300 [+0.300, +0.300], better" in text
    assert "sst2: small - random:small = +0.010" in text and "no difference beyond the spread" in text


def test_the_command_prints_a_table_and_json_lines(tmp_path, teacher, capsys):
    data = write_stsb(write_sst2(tmp_path / "data"), glue=False)
    out = tmp_path / "out"
    models = [str(teacher), f"random:{teacher}", f"layers:{teacher}:2x24"]
    arguments = ["evaluate", *models, "--tasks", "stsb-embed,sst2", "--data", str(data), "--seeds", "2"]
    arguments += ["--parallel", "1"]
    assert main([*arguments, "--train-rows", "16", "--out", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["model"], line["task"]) for line in lines] == [
        (model, task) for task in ("stsb-embed", "sst2") for model in models
    ]
    for line in lines:
        assert line["score"] == pytest.approx(np.mean(line["scores"])) and line["seconds"] > 0
    assert [len(line["scores"]) for line in lines] == [1, 2, 1, 2, 2, 2]
    assert lines[0]["metric"] == "spearman" and lines[3]["train_rows"] == 16
    command = [*arguments, "--train-rows", "16", "--out", str(out), "--teacher", str(teacher)]
    assert main(command) == 0
    text, told = capsys.readouterr()
    assert told == ""  # all was there
    assert f"{teacher} (teacher)" in text and "of the teacher" in text
    assert "glue-fixed: learnt from 16 training rows at most" in text
    page = Page((out / "report.html").read_text())
    assert page.fetched == [] and "script" not in page.tags
    sst2 = next(line for line in lines if line["model"] == str(teacher) and line["task"] == "sst2")
    mean, spread = sst2["score"], sst2["spread"]
    assert f"{mean:.3f} ± {spread:.3f}" in page.cells and "2 x 24" in page.cells
    assert page.tags.count("svg") == 2 and page.tags.count("circle") == 6
    assert f"| {mean:.3f} ± {spread:.3f} |" in (out / "report.md").read_text()


class Page(HTMLParser):
    """The tags of a page, the text of its table cells, and whatever a browser would fetch for it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "colla", "--data", "DATA"], "no task is called 'colla'; did you mean 'cola'?"),
        (["--tasks", "cola"], "give --data DIR, which holds a folder with the published files of each task"),
        (
            ["--tasks", "rte", "--data", "DATA"],
            "task rte has no folder in DATA (there: SST-2); expected DATA/RTE with",
        ),
        (
            ["--data", "DATA"],
            "task stsb-embed has no folder in DATA (there: SST-2); expected DATA/STS-B with",
        ),
        (["--data", "DATA/none"], "--data DATA/none: no such folder; give the folder that holds"),
        (["--tasks", "sst2", "--protocol", "embed-fast", "--data", "DATA"], "does not have task sst2"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, teacher, capsys, arguments, message):
    data = write_sst2(tmp_path / "data")
    given = [argument.replace("DATA", str(data)) for argument in arguments]
    out = tmp_path / "out"
    assert main(["evaluate", str(teacher), *given, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilm: error: ") and message.replace("DATA", str(data)) in line
    assert not out.exists()


def test_a_file_is_no_place_for_results(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    assert main(["evaluate", "x", "--data", ".", "--out", str(out)]) == 2
    expected = f"{out} can't be a folder: {tmp_path / 'file'} is a file; give another place"
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"


def test_a_model_without_a_tokenizer_is_refused_by_the_command(tmp_path, teacher, capsys):
    folder: Path = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(teacher / name, folder / name)
    data = write_sst2(tmp_path / "data")
    assert (
        main(["evaluate", str(folder), "--tasks", "sst2", "--data", str(data), "--out", str(tmp_path / "o")])
        == 2
    )
    assert f"{folder} has no tokenizer (no tokenizer.json" in capsys.readouterr().err


def test_an_architecture_without_a_head_for_the_task_is_refused():
    with pytest.raises(UserError, match="no head for tasks of spans on a nomic_bert; leave such tasks out"):
        check_head("nomic_bert", "spans")
    check_head("nomic_bert", "classes")
    check_head("no such thing", "cosine")
