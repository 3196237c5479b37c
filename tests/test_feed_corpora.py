"""A stage on mixtures, windows, URLs and pairs read in place: real processes, a real HTTP server on loopback."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from minilm.data.builder.build import build
from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.model.export import weights_digest
from minilm.orchestrator import cli
from minilm.orchestrator.driver.verify_run import verify_run
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed.corpora import cache_folder, close, describe, open_held_out, open_stream
from minilm.orchestrator.stage.data import CacheSpec, CorpusSpec, DataSpec, PairSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.bad_server import BadServer
from tests.conftest import WORDS, write_text
from tests.data_cases import write_megatron
from tests.support import change, checkpoints_in, make_spec

ORDER = {"seed": 3, "batch": 8, "micro_batch": 4}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Path, Path]:
    """Two data sets of several small shards each."""
    folder = tmp_path_factory.mktemp("sets")
    found = []
    for seed, name in enumerate(("books", "wiki")):
        text = write_text(folder / f"{name}.txt", documents=60, seed=seed)
        options = {"seq_len": 32, "held_out": 0.1, "rows_per_block": 8, "shard_bytes": 1, "processes": 1}
        build([text], str(teacher), folder / name, **options)
        assert load_manifest(folder / name).num_shards > 4
        found.append(folder / name)
    return found[0], found[1]


@pytest.fixture
def server(sets: tuple[Path, Path]) -> Iterator[BadServer]:
    running = BadServer(sets[0].parent)
    yield running
    running.close()


def mixture(books: object, wiki: object, **options: object) -> DataSpec:
    corpora = [CorpusSpec("books", str(books), 0.7), CorpusSpec("wiki", str(wiki), 0.3)]
    return describe(corpora, **{"window": 2, **options})  # type: ignore[arg-type]


def digest(spec: StageSpec) -> str:
    return weights_digest(StageFolder(Path(spec.folder)).student("small"))


def newest(spec: StageSpec) -> Path:
    return checkpoints_in(StageFolder(Path(spec.folder)).checkpoints)[-1]


def test_a_mixture_with_a_window_killed_and_resumed_gives_the_same_bits(sets, teacher, tmp_path):
    whole = make_spec(mixture(*sets), teacher, tmp_path / "whole", steps=40)
    assert StageSpec.from_json(whole.to_json()) == whole
    assert run_stage(whole)
    spec = replace(whole, folder=str(tmp_path / "killed"))
    assert worker_pool.kill_at(spec, 1, rank=0, step=9) == [-signal.SIGKILL], worker_pool.log(spec)
    assert worker_pool.join(worker_pool.start(spec, 1)) == [0], worker_pool.log(spec)
    assert digest(spec) == digest(whole)
    assert (check := verify_run(newest(spec))).sound and check.rows == 320
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in sets]
    assert verify_run(newest(spec), [str(folder) for folder in moved]).sound
    with pytest.raises(UserError, match="belongs to other data .*; give what the run has read"):
        verify_run(newest(spec), [str(folder) for folder in reversed(moved)])
    with pytest.raises(UserError, match=r"was made from 2 data sets .*, 1 are given; give as many"):
        verify_run(newest(spec), [str(moved[0])])
    plain = make_spec(mixture(*sets, window=None), teacher, tmp_path / "full", steps=40)
    assert run_stage(plain)
    assert digest(plain) != digest(whole), "the window is not looked at"


def test_each_corpus_is_measured_and_the_mean_is_weighted(sets, teacher, tmp_path):
    spec = make_spec(mixture(*sets), teacher, tmp_path, steps=2, held_out_rows=10)
    assert run_stage(spec)
    for point in read_all_metrics(StageFolder(tmp_path).heldout_metrics):
        for term in ("attention", "value"):
            books, wiki = (point.metrics[f"small/heldout/{term}/{name}"] for name in ("books", "wiki"))
            assert books != wiki
            assert point.metrics[f"small/heldout/{term}"] == pytest.approx(0.7 * books + 0.3 * wiki)
    alone = make_spec(describe([CorpusSpec("books", str(sets[0]))]), teacher, tmp_path / "alone", steps=2)
    assert run_stage(change(alone, held_out_rows=7))
    (first, _), (other, _) = (
        read_all_metrics(StageFolder(Path(j.folder)).heldout_metrics) for j in (spec, alone)
    )
    assert set(other.metrics) == {"small/heldout/attention", "small/heldout/value"}
    assert first.metrics["small/heldout/value/books"] == other.metrics["small/heldout/value"]


def test_data_behind_urls_give_the_weights_of_data_on_disk(sets, teacher, tmp_path, server):
    local = make_spec(mixture(*sets), teacher, tmp_path / "local", steps=20)
    assert run_stage(local)
    cache = CacheSpec(str(tmp_path / "cache"))
    server.faults = {"wiki/shard-000001.tar": ["reset", "short"]}
    far = mixture(sets[0].as_uri(), f"{server.url}/wiki", cache=cache)
    assert [corpus.fingerprint for corpus in far.corpora] == [
        corpus.fingerprint for corpus in local.data.corpora
    ]
    spec = make_spec(far, teacher, tmp_path / "far", steps=20)
    assert run_stage(spec)
    assert digest(spec) == digest(local)
    assert verify_run(newest(spec), cache=cache).sound
    counts = read_all_metrics(StageFolder(tmp_path / "far").step_metrics)[-1].metrics
    assert counts["data/bytes_fetched"] > 0 and counts["data/retries"] >= 1
    assert "data/retries" not in read_all_metrics(StageFolder(tmp_path / "local").step_metrics)[-1].metrics
    shards = [path for path in (tmp_path / "cache" / "shards").iterdir() if path.is_file()]
    assert len(shards) > 4


def test_data_that_are_replaced_in_the_middle_of_a_run_end_it(sets, teacher, tmp_path, server):
    here = shutil.copytree(sets[0], tmp_path / "here")
    cache = CacheSpec(str(tmp_path / "cache"))
    far = mixture(here.as_uri(), sets[1], cache=cache)
    near = mixture(here, sets[1])
    shutil.rmtree(here)
    shutil.copytree(sets[1], here)
    for data, kind in ((near, UserError), (far, DataError)):
        with pytest.raises(
            kind, match=r"replaced: its fingerprint is .*, this run began with .*put the right"
        ):
            open_stream(data, **ORDER)


def test_a_cache_that_cannot_hold_what_is_read_at_a_time(sets, tmp_path):
    small = CacheSpec(str(tmp_path), gigabytes=1e-6)
    with pytest.raises(UserError, match=r"GB of shards are read at a time, and data.cache_gigabytes is 1e-06; give "
                                        r"data.window \(a shuffle by so many shards"):  # fmt: skip
        describe([CorpusSpec("far", sets[0].as_uri())], cache=small)
    with pytest.raises(UserError, match=r"give a smaller data.window, or a larger cache"):
        describe([CorpusSpec("far", sets[0].as_uri())], cache=small, window=1)


def test_a_url_without_held_out_rows(sets, tmp_path):
    bare = shutil.copytree(sets[0], tmp_path / "bare", ignore=shutil.ignore_patterns("held-out"))
    with pytest.raises(
        UserError, match=r"its held-out split, .* cannot be read \(.*no such object.*--held-out 0.01"
    ):
        describe([CorpusSpec("far", bare.as_uri())], cache=CacheSpec(str(tmp_path / "cache")))


def test_the_cache_of_a_node(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(CacheSpec()) == tmp_path / "minilm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(CacheSpec()) == tmp_path / "home" / ".cache" / "minilm"
    assert cache_folder(CacheSpec("/else")) == Path("/else")


@pytest.fixture
def pair(tmp_path: Path, teacher: Path) -> CorpusSpec:
    """A Megatron pair of the teacher's own ids; a tenth of its rows at the end is held out."""
    numbers = np.random.default_rng(0).integers(5, 5 + len(WORDS), (60, 40))
    prefix = write_megatron(tmp_path / "tokens", [[line.tolist()] for line in numbers])
    how = PairSpec(str(teacher), seq_len=32, held_out=0.1, source_tokenizer=str(teacher))
    return CorpusSpec("pair", str(prefix), 0.5, pair=how)


def test_a_pair_is_read_in_place_and_its_end_is_held_out(pair, sets, teacher, tmp_path):
    data = describe([pair, CorpusSpec("books", str(sets[0]), 0.5)])
    assert DataSpec.from_values(data.to_values()) == data
    (held, _), stream = open_held_out(data), open_stream(data, **ORDER)
    total = 60 * 41 // 30  # documents of 40 tokens, and a SEP put after each
    assert (held.rows.num_rows, stream.corpora[0].rows.num_rows) == (total // 10, total - total // 10)
    trained, kept = (rows.read(range(rows.num_rows)) for rows in (stream.corpora[0].rows, held.rows))
    assert trained.row_ids.tolist() == list(range(total - total // 10))
    assert not {tuple(row) for row in kept.input_ids.tolist()} & {
        tuple(row) for row in trained.input_ids.tolist()
    }
    with pytest.raises(DataError, match=f"these data have rows 0 to {total // 10 - 1}"):
        held.rows.read([total // 10])
    spec = make_spec(data, teacher, tmp_path / "stage", steps=6)
    assert run_stage(spec)
    assert verify_run(newest(spec)).sound
    close(open_held_out(data))


def test_a_pair_of_one_row_has_nothing_to_measure_on(pair):
    assert pair.pair
    with pytest.raises(
        UserError, match=r"tokens.bin holds 1 row of 2002 tokens, and one is for measuring; give more"
    ):
        describe([replace(pair, pair=replace(pair.pair, seq_len=2002))])


def test_a_recipe_with_a_mixture_behind_urls(sets, teacher, tmp_path, server, capsys, monkeypatch):
    """From the YAML through `minilm run` to a registered student, and again: nothing is left to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stage = {"batch": 8, "steps": 6, "peak_lr": 1e-3, "warmup_steps": 2, "held_out_rows": 8}
    student = {"layers": 1, "hidden": 24}
    recipe = {
        "name": "mixed",
        "data": {
            "corpora": [
                {"name": "wiki", "shards": f"{server.url}/wiki", "weight": 0.7},
                {"shards": "sets/books", "weight": 0.3},
            ],
            "window": 2,
        },
        "stages": [{"name": "small", "teacher": str(teacher), "student": student, **stage}],
        "compute": {"micro_batch": 4, "threads": 1, "device": "cpu"},
    }
    (tmp_path / "sets").symlink_to(sets[0].parent)
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run = ["run", str(path), "--workdir", str(tmp_path / "work"), "--launcher", "inline"]
    assert cli.main(run) == 0, capsys.readouterr().err
    assert "mixed-small v1" in capsys.readouterr().out
    exported = tmp_path / "work" / "stages" / "small" / "students" / "small"
    assert (exported / "tokenizer.json").exists()
    spec = StageSpec.from_json((exported.parent.parent / "stage.json").read_text())
    assert [corpus.name for corpus in spec.data.corpora] == ["wiki", "corpus-2"]
    metrics = read_all_metrics(StageFolder(Path(spec.folder)).heldout_metrics)[-1].metrics
    assert "small/heldout/value/corpus-2" in metrics
    checkpoints = sorted((exported.parent.parent / "checkpoints").glob("step-*"))
    assert cli.main(["data", "verify-run", str(checkpoints[-1])]) == 0
    assert cli.main(run) == 0 and "is done already" in capsys.readouterr().err
    (tmp_path / "work" / "summary.json").unlink()
    other = shutil.copytree(sets[1], tmp_path / "served" / "wiki")
    (other / "manifest.json").write_bytes((sets[0] / "manifest.json").read_bytes())
    server.folder = other.parent
    assert cli.main(run) == 2
    assert "/wiki was replaced: its fingerprint was" in capsys.readouterr().err
