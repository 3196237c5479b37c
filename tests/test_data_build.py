"""Building: exact, the same bytes whatever the processes, resumable after a kill, nothing half-written."""

import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import lzma
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from transformers import AutoTokenizer

from minilm.data.builder import local_pool as workers
from minilm.data.builder import tokenization as build_tasks
from minilm.data.builder.build import _lock, build, import_data
from minilm.data.builder.enough import check_enough
from minilm.data.errors import DataError
from minilm.data.format import shard as shard_module
from minilm.data.format.manifest import load_manifest
from minilm.data.read.reader import RowReader
from minilm.data.sources import progress as telling
from minilm.data.sources import text as source
from minilm.data.sources import unpack
from minilm.data.tokenizer import load_tokenizer
from tests.data_cases import CLS, PAD, SEP, make_documents, make_tokenizer


def files_of(folder):
    """Every file that a reader can meet, with its bytes; build.json tells of paths and times and is left
    out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "build.json" and path.parent.name != "report"
    }


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Several files in several formats, cut into many units."""
    monkeypatch.setattr(source, "_RANGE_BYTES", 1500)
    documents = make_documents(90)
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:40]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in documents[40:70]))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(documents[70:]).encode()))
    return [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.json.gz"]


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


SMALL = {"seq_len": 16, "rows_per_block": 8, "shard_bytes": 20_000}


def test_full_packing_keeps_every_token_of_every_document(text, tokenizer, tmp_path):
    report = build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    manifest = load_manifest(tmp_path / "out")
    batch = RowReader(tmp_path / "out").read(range(manifest.rows))
    assert batch.mask is None
    rows = batch.input_ids
    assert (rows[:, 0] == CLS).all() and (rows[:, -1] == SEP).all()
    stream = rows[:, 1:-1].flatten().tolist()
    encode = AutoTokenizer.from_pretrained(tokenizer)
    wanted = {
        tuple(encode(d, add_special_tokens=False, truncation=False, padding=False)["input_ids"])
        for d in make_documents(90)
    }
    found, current = [], []
    for token in stream:
        if token == SEP:
            found.append(tuple(current))
            current = []
        else:
            current.append(token)
    assert set(found) <= wanted and len(found) == len(set(found))
    assert sum(map(len, wanted)) + len(wanted) - len(stream) < 14  # less than a row is left behind
    assert report.documents == 90 and report.tokens == sum(map(len, wanted))
    assert report.rows == manifest.rows and manifest.tokens == rows.numel()
    assert 0 <= report.truncated_share < 14 / report.tokens
    assert found != sorted(found, key=lambda d: list(wanted).index(d))


def test_document_packing_never_mixes_documents(text, tokenizer, tmp_path):
    report = build(text, tokenizer, tmp_path / "out", packing="document", processes=1, **SMALL)
    manifest = load_manifest(tmp_path / "out")
    batch = RowReader(tmp_path / "out").read(range(manifest.rows))
    encode = AutoTokenizer.from_pretrained(tokenizer)
    pieces = []
    for document in make_documents(90):
        ids = encode(document, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        pieces += [tuple(ids[i : i + 14]) for i in range(0, len(ids), 14)]
    lengths = batch.mask.sum(1)
    assert (batch.input_ids[~batch.mask] == PAD).all()
    assert (batch.input_ids[range(manifest.rows), lengths - 1] == SEP).all()
    found = [tuple(row[1 : n - 1].tolist()) for row, n in zip(batch.input_ids, lengths, strict=True)]
    assert sorted(found) == sorted(pieces)
    assert report.truncated_share == 0 and manifest.tokens == int(lengths.sum())


def test_sentence_packing_gives_each_sentence_a_row_and_splits_by_document(tokenizer, tmp_path, monkeypatch):
    documents = [
        f"Dr. {word} went home at 5 p.m. today. Was it late?\nNot for {word}... no! " + "word " * 30 + "end."
        for word in (f"w{i}" for i in range(40))
    ]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(documents))
    options = {"packing": "sentence", "held_out": 0.3, **SMALL}
    report = build([file], tokenizer, tmp_path / "out", processes=1, **options)
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def rows(folder):
        reader = RowReader(folder)
        batch = reader.read(range(reader.manifest.rows))
        return [
            tuple(row[1 : n - 1].tolist()) for row, n in zip(batch.input_ids, batch.mask.sum(1), strict=True)
        ]

    def wanted(document):
        first, rest = document.split("\n")
        one, two = first.split(" Was")
        three, four = rest.split("no! ")
        coded = [
            encode(t, add_special_tokens=False)["input_ids"] for t in (one, "Was" + two, three + "no!", four)
        ]
        return [tuple(ids[i : i + 14]) for ids in coded for i in range(0, len(ids), 14)]

    train, held_out = rows(tmp_path / "out"), rows(tmp_path / "out" / "held-out")
    assert sorted(train + held_out) == sorted(row for document in documents for row in wanted(document))
    whole = [set(wanted(document)) for document in documents]
    assert report.documents == 40 and report.held_out_documents == sum(w <= set(held_out) for w in whole) > 3
    assert report.split_share == 110 / 160 and "68.8% of the sentences are longer" in report.text()
    monkeypatch.setattr(build_tasks, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(build_tasks, "_RUN_TOKENS", 300)
    monkeypatch.setattr("minilm.data.builder.phases._BUCKET_TOKENS", 500)
    build([file], tokenizer, tmp_path / "other", processes=2, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")


def test_sentence_packing_of_token_ids_is_refused(tokenizer, tmp_path):
    said = "source 'megatron' holds token ids, and packing 'sentence' splits text; give the text that they were made"
    with pytest.raises(DataError, match=said):
        import_data(["x"], tokenizer, tmp_path / "out", source="megatron", packing="sentence", **SMALL)


@pytest.mark.parametrize("packing", ["full", "document", "masked"])
def test_bytes_are_the_same_for_any_number_of_processes(text, tokenizer, tmp_path, packing, monkeypatch):
    monkeypatch.setattr("minilm.data.builder.phases._BUCKET_TOKENS", 900)
    options = {"packing": packing, "held_out": 0.2, **SMALL}
    one = build(text, tokenizer, tmp_path / "one", processes=1, **options)
    three = build(text, tokenizer, tmp_path / "three", processes=3, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert one.fingerprint == three.fingerprint
    assert len(load_manifest(tmp_path / "one").shards) > 1


def test_bytes_do_not_depend_on_how_the_text_is_cut_into_units(text, tokenizer, tmp_path, monkeypatch):
    build(text, tokenizer, tmp_path / "one", processes=1, **SMALL)
    monkeypatch.setattr(source, "_RANGE_BYTES", 1 << 20)
    monkeypatch.setattr(build_tasks, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(build_tasks, "_RUN_TOKENS", 300)
    monkeypatch.setattr("minilm.data.builder.phases._BUCKET_TOKENS", 500)
    build(text, tokenizer, tmp_path / "other", processes=1, **SMALL)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_held_out_documents_are_in_the_held_out_set_only(text, tokenizer, tmp_path):
    copies = tmp_path / "copies.txt"
    copies.write_text("\n\n".join(make_documents(90)))  # every document twice
    report = build([*text, copies], tokenizer, tmp_path / "out", held_out=0.3, packing="document", **SMALL)
    assert 180 * 0.15 < report.held_out_documents < 180 * 0.45 and report.held_out_documents % 2 == 0

    def rows(folder):
        reader = RowReader(folder)
        return {tuple(row.tolist()) for row in reader.read(range(reader.manifest.rows)).input_ids}

    train, held_out = rows(tmp_path / "out"), rows(tmp_path / "out" / "held-out")
    assert len(held_out) > 10 and not train & held_out
    other = build(text, tokenizer, tmp_path / "seed", held_out=0.3, seed=1, processes=1, **SMALL)
    assert other.fingerprint != report.fingerprint


def test_a_second_call_finds_it_done(text, tokenizer, tmp_path, monkeypatch):
    first = build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    monkeypatch.setattr("minilm.data.builder.phases.run_tasks", None)
    assert build(text, tokenizer, tmp_path / "out", processes=2, **SMALL) == first
    moved = tmp_path / "moved"
    moved.mkdir()
    again = [Path(shutil.copy(path, moved)) for path in text]  # same text elsewhere, with other times
    assert build(again, tokenizer, tmp_path / "out", **SMALL) == first


def test_a_folder_of_another_build_is_left_alone(text, tokenizer, tmp_path):
    build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"built differently \(seed changed\); choose another folder"):
        build(text, tokenizer, tmp_path / "out", processes=1, seed=3, **SMALL)
    text[0].write_text("quite another text")
    with pytest.raises(DataError, match=r"built differently \(text changed\)"):
        build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    assert files_of(tmp_path / "out") == before


def test_progress_rises_to_one_and_tells_time_left(text, tokenizer, tmp_path):
    seen = []
    build(text, tokenizer, tmp_path / "out", processes=1, progress=seen.append, **SMALL)
    assert [p.phase for p in seen][:: len(seen) - 1] == ["tokenize", "write"]
    shares = [p.share for p in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert seen[-1].documents == 90 and seen[-1].seconds_left == 0


def frames(raw):
    return b"".join(zstandard.compress(raw[at : at + 5000]) for at in range(0, len(raw), 5000))


@pytest.mark.parametrize("packer", ["", ".gz", ".xz", ".zst"])
def test_one_process_tells_progress_inside_a_task(tokenizer, tmp_path, monkeypatch, packer):
    """One file that is one task: share, documents and time left move while it runs."""
    monkeypatch.setattr(telling, "EVERY_SECONDS", 0)
    monkeypatch.setattr(build_tasks, "_BATCH_CHARACTERS", 4000)
    raw = "\n\n".join(make_documents(600)).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": frames}[packer]
    monkeypatch.setattr(unpack, "BUFFER_BYTES", 4096)
    text = tmp_path / f"text.txt{packer}"
    text.write_bytes(pack(raw))
    seen = []
    build([text], tokenizer, tmp_path / "out", processes=1, progress=seen.append, **SMALL)
    inside = [p for p in seen if p.phase == "tokenize" and p.done == 0]
    assert inside[0].total == 1 and inside[0].share == 0 and math.isnan(inside[0].seconds_left)
    shares = sorted({round(p.share, 2) for p in inside})
    assert len(shares) > 5 and shares[-1] > 0.6  # tokenize is 0.85 of all
    assert all(p.seconds_left > 0 for p in inside if p.share)
    assert 0 < inside[len(inside) // 2].documents < 600 and inside[-1].tokens > 5000
    for name in ("share", "documents", "tokens"):
        values = [getattr(p, name) for p in seen]
        assert values == sorted(values)


class Noted(dict):
    """What tasks under way tell; everything is kept."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __setitem__(self, key, value):
        self.all.append((key, value))
        super().__setitem__(key, value)


def test_worker_processes_tell_how_far_a_task_is(tokenizer, tmp_path):
    text = tmp_path / "text.txt.gz"  # more than 1 MiB packed: two tasks
    text.write_bytes(gzip.compress("\n\n".join(make_documents(20_000)).encode(), 1))

    def stop(progress):
        raise Killed

    with pytest.raises(Killed):
        build([text], tokenizer, tmp_path / "out", processes=2, progress=stop, seq_len=64)
    under_way = Noted()
    tasks = [("tokenize", {"folder": str(tmp_path / "out" / ".build"), "unit": i}) for i in range(2)]
    results = dict(workers.run_tasks(tasks, 2, under_way, lambda: None))
    assert sum(result["documents"] for result in results.values()) == 20_000
    assert {index for index, _ in under_way.all} == {0, 1} and not under_way
    for number in range(2):
        told = [entry for index, entry in under_way.all if index == number]
        assert 0 < told[0]["share"] <= 1 and 0 < told[-1]["documents"] < results[number]["documents"]
        assert told == sorted(told, key=lambda entry: entry["tokens"])


BUILD = """
import sys
from minilm.data.sources import text
text._RANGE_BYTES = 1500
from minilm.data.builder.build import build, import_data
build(sys.argv[3:], sys.argv[1], sys.argv[2], held_out=0.2, processes=2, seq_len=16, rows_per_block=8,
shard_bytes=20000)
"""


def run_build(tokenizer, out, text):
    root = str(Path(build_tasks.__file__).parents[3])
    command = [sys.executable, "-c", BUILD, tokenizer, str(out), *map(str, text)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)


def test_a_build_that_is_killed_goes_on_and_ends_with_the_same_bytes(text, tokenizer, tmp_path):
    build(text, tokenizer, tmp_path / "whole", held_out=0.2, processes=1, **SMALL)
    out, rng, kills = tmp_path / "out", random.Random(5), 0
    while not (out / "manifest.json").exists() and kills < 3:
        process = run_build(tokenizer, out, text)
        while process.poll() is None and not (out / ".build" / "plan.json").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert run_build(tokenizer, out, text).wait() == 0
    assert kills >= 1
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (out / ".build").exists() and not (out / ".lock").exists()


@pytest.mark.parametrize("by", ["a killed process", "one that still ends"])
def test_a_file_that_is_not_whole_is_not_published(text, tokenizer, tmp_path, monkeypatch, by):
    build(text, tokenizer, tmp_path / "whole", processes=1, **SMALL)
    with contextlib.ExitStack() as writers, monkeypatch.context() as patch:

        def killed(manifest, path):
            file = writers.enter_context(path.with_name(".manifest.json.0a1b2c3d.tmp").open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            raise KeyboardInterrupt

        patch.setattr("minilm.data.builder.phases.save_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
        patch.undo()
        assert list((tmp_path / "out" / ".build" / "train").glob(".manifest.json.*"))
        if by == "a killed process":
            writers.close()
        build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_lock_holds_though_every_holder_removes_it(tmp_path):
    inside, most = 0, 0

    def hold():
        nonlocal inside, most
        for _ in range(40):
            with _lock(tmp_path / "out"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list((tmp_path / "out").iterdir())


def test_what_a_build_left_when_it_was_killed_at_its_very_end_is_removed(text, tokenizer, tmp_path):
    whole = build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
    (tmp_path / "out" / ".build" / "runs").mkdir(parents=True)
    (tmp_path / "out" / ".build" / "runs" / "000000-0000.run").write_bytes(bytes(100))
    for _ in range(2):
        again = build(text, tokenizer, tmp_path / "out", processes=1, **SMALL)
        assert again == whole
        assert not (tmp_path / "out" / ".build").exists() and not (tmp_path / "out" / ".lock").exists()
        (tmp_path / "out" / ".lock").touch()  # all that is left a moment later


def test_another_build_removes_what_one_had_published_when_it_was_killed(
    text, tokenizer, tmp_path, monkeypatch
):
    synced = []

    def killed_in_the_middle():
        synced.append(True)
        if len(synced) == 2:  # the held-out set is in place, the shards of the other without their manifest
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", killed_in_the_middle)
        with pytest.raises(Killed):
            build(text, tokenizer, tmp_path / "out", held_out=0.3, processes=1, **SMALL)
    assert (tmp_path / "out" / "held-out" / "manifest.json").exists()
    assert len(list((tmp_path / "out").glob("shard-*.tar"))) > 1
    larger = {**SMALL, "shard_bytes": 1 << 20}
    build(text, tokenizer, tmp_path / "out", processes=1, **larger)
    build(text, tokenizer, tmp_path / "clean", processes=1, **larger)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


class Killed(BaseException):
    """Stands for the end of the process at exactly this point."""


@pytest.mark.parametrize("at", range(0, 26, 3))
def test_a_build_that_ends_at_any_result_goes_on(text, tokenizer, tmp_path, monkeypatch, at):
    whole = build(text, tokenizer, tmp_path / "whole", held_out=0.2, processes=1, **SMALL)
    seen = 0

    def stop(progress):
        nonlocal seen
        seen += 1
        if seen > at:
            raise Killed

    with pytest.raises(Killed):
        build(text, tokenizer, tmp_path / "out", held_out=0.2, processes=1, progress=stop, **SMALL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = build(text, tokenizer, tmp_path / "out", held_out=0.2, processes=1, **SMALL)
    assert again.fingerprint == whole.fingerprint
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_full_disk_leaves_no_data_set_and_the_build_goes_on_later(text, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls = 0

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    real = shard_module._member
    monkeypatch.setattr(shard_module, "_member", full)
    with pytest.raises(
        DataError, match=r"the disk of '.*out' is full .*free some space and run the same command"
    ):
        build(text, tokenizer, out, processes=1, **SMALL)
    assert [path.name for path in out.iterdir()] == [".build"]
    assert not list(out.rglob("*.tar")) and not list(out.rglob(".shard*"))
    with pytest.raises(DataError, match=r"holds no data set \(manifest\.json is missing\)"):
        RowReader(out)
    monkeypatch.undo()
    build(text, tokenizer, out, processes=1, **SMALL)
    build(text, tokenizer, tmp_path / "whole", processes=1, **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("most", [1024, 12288])  # too little for the tokenizer; too little for a shard
def test_a_disk_that_refuses(text, tokenizer, tmp_path, most):
    """Files of the build and its workers may not grow behind `most` bytes: the system refuses, the build says
    so."""
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
    script += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + BUILD
    script = script.replace("\nbuild(", "\nfrom minilm.data.errors import DataError\ntry:\n build(") + (
        "except DataError as error:\n print('DataError', error)\n"
    )
    root = str(Path(build_tasks.__file__).parents[3])
    command = [sys.executable, "-c", script, tokenizer, str(tmp_path / "out"), *map(str, text)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert "DataError the disk of" in done.stdout and "File too large" in done.stdout
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 2}, "seq_len 2 leaves no room"),
        ({"packing": "dense"}, r"packing 'dense' is not known; allowed: full, masked, document"),
        ({"held_out": 0.7}, r"held_out 0\.7 is outside 0 … 0\.5"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"rows_per_block": 0}, "rows_per_block 0 is too small; give at least 1"),
        ({"seq_len": 100_000}, r"the text has 90 documents with \d+ tokens, less than one row of 100000"),
        (
            {"held_out": 0.001},
            r"the held-out split has \d documents with \d+ tokens, .* or a larger held_out",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(text, tokenizer, tmp_path, options, message):
    with pytest.raises(DataError, match=message) as caught:
        build(text, tokenizer, tmp_path / "out", processes=1, **{**SMALL, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packing", ["full", "document"])
@pytest.mark.parametrize(
    ("lines", "held_out"), [(1, 0.0), (1, 0.5), (9, 0.02), (40, 0.02), (40, 0.3), (0, 0.3)]
)
def test_what_a_build_would_end_with_is_known_before(tokenizer, tmp_path, packing, lines, held_out):
    """The same sentence as the build's, or none where the build has rows."""
    said = []
    for seed in range(3):
        file = tmp_path / f"{seed}.txt"
        file.write_text("\n\n".join(f"{'time ' * (7 * (i % 5) + seed)}{i}" for i in range(lines)) + "\n")
        options = {"seq_len": 32, "packing": packing, "held_out": held_out, "seed": seed}
        said.append(error_of(build, [file], tokenizer, tmp_path / f"out-{seed}", processes=1, **options))
        options |= {"options": {}, "special_tokens": "text"}
        assert said[-1] == error_of(check_enough, [file], load_tokenizer(tokenizer), **options)
    assert any(said) == ((lines, held_out) != (40, 0.3) and (packing, held_out) != ("document", 0.0))


def error_of(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except DataError as error:
        return str(error)
    return ""


def test_hardly_anything_of_a_large_text_is_read_to_know_that_it_is_enough(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "large.txt").write_text("\n\n".join(f"time year {i} day" for i in range(50_000)))
    read, num_read = source.read_unit, itertools.count()
    monkeypatch.setattr(source, "read_unit", lambda *of: (d for d in read(*of) if next(num_read) >= 0))
    options = {"seq_len": 32, "packing": "full", "held_out": 0.1, "seed": 0, "options": {}}
    check_enough([tmp_path / "large.txt"], load_tokenizer(tokenizer), special_tokens="text", **options)
    assert next(num_read) < 1_000


def test_text_of_blanks_only_is_an_error(tokenizer, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    with pytest.raises(DataError, match=r"no text in '.*blank\.txt'; give files with text"):
        build([tmp_path / "blank.txt"], tokenizer, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_damaged_text_found_in_a_worker_process_is_the_same_error(text, tokenizer, tmp_path):
    with text[1].open("a") as file:
        file.write('{"body": "more"}\n' * 300 + "{broken\n")
    with pytest.raises(DataError, match=r"b\.jsonl', byte \d+: not JSON .*mend or remove that line"):
        build(text, tokenizer, tmp_path / "out", processes=2, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json or vocabulary file there; give a folder"):
        build(text, str(tmp_path / "empty"), tmp_path / "out", **SMALL)


def test_big_vocabularies_take_four_bytes(text, tmp_path):
    big = make_tokenizer(tmp_path / "big", extra_tokens=70_000)
    build(text, big, tmp_path / "out", processes=1, **SMALL)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dtype == "uint32" and manifest.tokenizer.vocab_size > 70_000
    assert RowReader(tmp_path / "out").read([0]).input_ids[0, 0] == CLS


def test_unknown_share_counts_unknown_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("aa éж жж bb " * 50)
    report = build([tmp_path / "a.txt"], tokenizer, tmp_path / "out", processes=1, **SMALL)
    assert report.unknown_share == pytest.approx(2 / 6, abs=0.01)
    assert "33.3% of the tokens are unknown to the tokenizer" in report.text().splitlines()[-1]


def worker_processes():
    """Children of this process that run data.workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_bytes().rpartition(b")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"minilm.data.builder.local_pool" in command:
            found.append(status.parent.name)
    return found


def test_workers_are_gone_when_a_task_fails_and_when_they_are_not_awaited():
    tasks = [("tokenize", {"folder": "/nonexistent", "unit": i}) for i in range(4)]
    with pytest.raises(FileNotFoundError):
        list(workers.run_tasks(tasks, 2, {}, lambda: None))
    assert not worker_processes()


def test_histogram_counts_every_document(text, tokenizer, tmp_path):
    report = build(text, tokenizer, tmp_path / "out", processes=1, held_out=0.2, **SMALL)
    assert sum(report.length_histogram) == report.documents
    assert np.average(np.arange(40), weights=report.length_histogram) > 5


def test_the_report_reads_well(text, tokenizer, tmp_path):
    report = build(text, tokenizer, tmp_path / "out", processes=1, held_out=0.2, **SMALL)
    told = report.text()
    assert (tmp_path / "out" / "report" / "report.txt").read_text() == told + "\n"
    saved = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert saved["rows"] == report.rows and not saved["warnings"] and "WARNING" not in told
    assert (tmp_path / "out" / "report" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert f"rows        {report.rows:,}  (held out: {report.held_out_rows} rows of" in told
    assert "b.jsonl: text from field 'body' (found by its name)" in told


def test_a_callback_that_raises_stops_the_build_and_leaves_no_process(text, tokenizer, tmp_path):
    def stop(progress):
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(text, tokenizer, tmp_path / "out", processes=2, progress=stop, **SMALL)
    assert not worker_processes()
    build(text, tokenizer, tmp_path / "out", processes=2, **SMALL)


MEMORY = """
import re, sys
from pathlib import Path
from minilm.data.builder import phases, tokenization
tokenization._RUN_TOKENS, phases._BUCKET_TOKENS = 1 << 17, 1 << 17
tokenization._BATCH_CHARACTERS = 1 << 16
from minilm.data.builder.build import build, import_data
report = build([sys.argv[1]], sys.argv[2], sys.argv[3], processes=1, seq_len=64)
status = Path("/proc/self/status").read_text()  # getrusage remembers the peak of the process that forked this one
print(report.tokens, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("packer", ["", ".xz"])
def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path, packer):
    """Eight times the text, in one file: a peak that is higher by less than the added tokens would take in memory."""
    peaks = []
    for count in (4000, 32_000):
        text = tmp_path / f"{count}.txt{packer}"
        raw = "\n\n".join(make_documents(count)).encode()
        text.write_bytes(lzma.compress(raw, preset=0) if packer else raw)
        command = [sys.executable, "-c", MEMORY, text, tokenizer, tmp_path / f"out-{count}"]
        root = str(Path(build_tasks.__file__).parents[3])
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=True
        )
        tokens, megabytes = map(int, done.stdout.split())
        peaks.append(megabytes)
    print(f"peaks {peaks} MB for {tokens} tokens at last")
    assert tokens > 3_000_000
    assert peaks[1] - peaks[0] < 8
