"""Checkpoints on object storage (moto's S3 on loopback): the promises of a folder, and what a network does to them."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minilm.data.storage import client
from minilm.data.storage.retry import RetryPolicy
from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.object_store import ObjectStore
from minilm.orchestrator.checkpoint.open_store import open_store
from minilm.orchestrator.checkpoint.store import StoreUnavailable, step_of
from minilm.orchestrator.errors import InfrastructureError, LeaseHeld, UserError
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.worker.error_file import run_reporting
from minilm.orchestrator.worker.loop import run_stage
from tests.support import make_spec
from tests.test_checkpoint import FACTS, MINE, advance, make

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
from minilm.orchestrator.checkpoint.state import capture
from tests.s3_server import S3Server

QUICK = RetryPolicy(tries=3, first_wait_seconds=0.01, longest_wait_seconds=0.05)


@pytest.fixture(scope="module")
def running():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def server(running, monkeypatch):
    """The server without faults, and the environment that leads to it."""
    for key, value in running.environment.items():
        monkeypatch.setenv(key, value)
    running.fault = lambda method, path: None
    running.victim = {}
    running.requests.clear()
    yield running
    running.fault = lambda method, path: None


@pytest.fixture
def store(server, tmp_path, request):
    name = re.sub(r"\W+", "-", request.node.name)
    return ObjectStore(f"s3://bucket/{name}/run/stage", tmp_path / "room", retry=QUICK)


def save(store, step, models, states, keep=2, **options):
    return checkpoint.write(store, step, capture(models, states), MINE, FACTS, keep=keep, **options)


def saved(store, *steps, keep=9):
    """Checkpoints of an advancing model; its weights by step."""
    models, states = make(0)
    weights = {}
    for step in steps:
        advance(states, step)
        save(store, step, models, states, keep=keep)
        weights[step] = models["s"].state_dict()["0.weight"].clone()
    return weights


def objects(store):
    return {name: sorted(files) for name, files in store._list().items()}


def test_a_restored_run_continues_bit_for_bit(store):
    models, states = make(0)
    for step in range(3):
        advance(states, step)
    save(store, 3, models, states)
    others, other_states = make(1)
    assert checkpoint.restore_newest(store, others, other_states, MINE) == (3, FACTS)
    peers, peer_states = make(2)
    assert checkpoint.restore_step(store, 3, peers, peer_states) == FACTS
    with pytest.raises(
        FileNotFoundError, match=f"checkpoint of step 4, .* is not in {store.where} as this worker"
    ):
        checkpoint.restore_step(store, 4, peers, peer_states)
    for which in (states, other_states, peer_states):
        advance(which, 3)
    for name, value in models["s"].state_dict().items():
        assert torch.equal(value, others["s"].state_dict()[name])
        assert torch.equal(value, peers["s"].state_dict()[name])
    assert list(store.folder.iterdir()) == []


def test_the_newest_and_every_nth_stay_and_a_step_is_saved_once(store):
    models, states = make(0)
    for step in range(1, 8):
        save(store, step, models, states, keep=2, keep_every=3)
    assert [step_of(name) for name in store.names()] == [3, 6, 7]
    assert save(store, 7, models, states) == store.names()[-1]
    files = ["checkpoint.json", "s.model.safetensors", "s.optimizer.safetensors"]
    assert list(objects(store).values()) == [files] * 3


def test_stages_beside_each_other_do_not_mix(store, server, tmp_path):
    saved(ObjectStore(f"{store.where}-two", tmp_path), 9)
    saved(store, 1)
    assert [step_of(name) for name in store.names()] == [1]


def test_nothing_there_means_none(store):
    assert checkpoint.restore_newest(store, *make(0), MINE) is None
    assert store.owner() is None


def damage_object(store, name, kind):
    path = f"{store.where}/{name}/s.model.safetensors"
    content = bytearray(store._client.fs.cat_file(path))
    if kind == "torn":
        store._client.fs.pipe_file(path, bytes(content[:-5]))
    elif kind == "flip":
        content[-1] ^= 1
        store._client.fs.pipe_file(path, bytes(content))
    elif kind == "lose":
        store._client.fs.rm_file(path)
    else:
        store._client.fs.pipe_file(f"{store.where}/{name}/checkpoint.json", b"{")


@pytest.mark.parametrize("kind", ["torn", "lose", "metadata"])
def test_a_damaged_one_is_passed_over_set_aside_and_its_step_saved_again(store, caplog, kind):
    weights = saved(store, 1, 2)
    damage_object(store, store.names()[-1], kind)
    models, states = make(5)
    assert checkpoint.restore_newest(store, models, states, MINE) == (1, FACTS)
    assert torch.equal(models["s"].state_dict()["0.weight"], weights[1])
    assert f"checkpoint {store.where}/step-000000002-" in caplog.text and "is damaged" in caplog.text
    assert [step_of(name) for name in store.names()] == [1]
    store.sweep()
    (aside,) = [name for name, files in objects(store).items() if "damaged.json" in files]
    assert step_of(aside) == 2
    save(store, 2, models, states)
    assert checkpoint.restore_newest(store, *make(6), MINE) == (2, FACTS)
    damage_object(store, store.names()[-1], "flip")
    checkpoint.restore_newest(store, *make(6), MINE)
    assert len([1 for files in objects(store).values() if "damaged.json" in files]) == 1
    assert aside not in objects(store)


def test_only_damaged_ones_are_an_error_and_not_a_fresh_start(store):
    saved(store, 1)
    damage_object(store, store.names()[0], "flip")
    with pytest.raises(
        UserError, match=r"none of the 1 checkpoints in s3://\S+ is sound \(step-\S+: .*\); restore one"
    ):
        checkpoint.restore_newest(store, *make(0), MINE)


@pytest.mark.slow  # a process a request
def test_killed_at_any_request_the_next_start_finds_a_whole_one(server, tmp_path):
    command = [sys.executable, "-m", "tests.crash_store", "s3://bucket/killed", str(tmp_path)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    told = [json.loads(line) for line in run.stdout.splitlines()]
    starts, ends = told[0::2], [line["status"] for line in told[1::2]]
    assert len(ends) > 8 and ends == [0] + [-9] * (len(ends) - 2) + [0]  # the first round makes steps 1 and 2
    assert starts[1]["step"] == 2
    gained = [b["step"] - a["step"] for a, b in itertools.pairwise(starts[1:])]
    assert set(gained) == {0, 1} and gained == sorted(
        gained
    )  # before the commit the old one, then the new one
    for start in starts[1:]:
        assert start["sound"] and start["left"] == [] and start["rooms"] <= 1, start
    assert any(start["rooms"] for start in starts)


@pytest.mark.parametrize("fault", ["500", "429", "stall"])
def test_a_fault_that_passes_is_tried_again(store, server, fault, caplog):
    struck = set()

    def once(method, path):
        """Every object's first request fails, and the first listing."""
        kind = (method, path.rpartition("/")[2] if method != "GET" else path)
        if kind in struck:
            return None
        struck.add(kind)
        return (lambda: time.sleep(1.3)) if fault == "stall" else fault

    if fault == "stall":
        store._client.retry = QUICK._replace(
            tries=8, request_seconds=1.0
        )  # a busy machine answers in that time
    server.fault = once
    with caplog.at_level(logging.WARNING):
        saved(store, 1)
        assert checkpoint.restore_newest(store, *make(1), MINE) == (1, FACTS)
    assert len(struck) >= 5
    assert "; try 2 in" in caplog.text


CAUSES = {"500": "Server Error", "reset": "onnection|no answer", "stall": "no answer within 0.5 s"}


@pytest.mark.parametrize("fault", CAUSES)
def test_a_fault_that_stays_is_an_error_in_one_line_that_names_the_place(store, server, fault):
    store._client.retry = QUICK._replace(tries=2, request_seconds=0.5 if fault == "stall" else 60.0)
    server.fault = lambda method, path: (lambda: time.sleep(1)) if fault == "stall" else fault
    with pytest.raises(StoreUnavailable, match=rf"{store.where}.*({CAUSES[fault]}).*tried 2 times") as caught:
        store.names()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 10


def test_a_refusal_is_final_and_not_tried_again(store, server, tmp_path):
    server.fault = lambda method, path: "403" if method == "PUT" else None
    with pytest.raises(InfrastructureError, match=r"put s3://\S+: the store refuses .* check compute.checkp"):
        store.claim("me")
    assert len(server.requests) == 1
    absent = ObjectStore("s3://no-such-bucket/x", tmp_path, retry=QUICK)
    with pytest.raises(InfrastructureError, match="the store refuses"):
        absent.claim("me")
    assert not issubclass(InfrastructureError, StoreUnavailable)


def test_what_did_not_arrive_whole_is_not_committed(store, server, monkeypatch):
    put = store._client.fs._put_file

    async def torn(source, url, **options):
        await put(source, url, **options)
        await store._client.fs._pipe_file(url, Path(source).read_bytes()[:-1])

    monkeypatch.setattr(store._client.fs, "_put_file", torn)
    with pytest.raises(StoreUnavailable, match="bytes were put"):
        saved(store, 1)
    assert store.names() == []
    monkeypatch.undo()
    saved(store, 2)
    assert list(objects(store)) == store.names()  # and what was left is gone


def test_the_guard_has_the_last_word_when_everything_else_has_arrived(store):
    there = []

    def overtaken():
        there.extend(objects(store).values())
        raise LeaseHeld("another run")

    with pytest.raises(LeaseHeld):
        save(store, 1, *make(0), guard=overtaken)
    assert there == [["s.model.safetensors", "s.optimizer.safetensors"]]
    assert store.names() == []


def test_one_that_is_removed_is_first_of_all_no_checkpoint_any_more(store, server):
    saved(store, 1)
    (name,) = store.names()
    store._client.fs.pipe_file(f"{store.where}/{name}/a-file-that-is-listed-before", b"x")
    server.requests.clear()
    store.remove(name)
    deleted = [path.rpartition("/")[2] for method, path in server.requests if method == "DELETE"]
    assert deleted[0] == "checkpoint.json" and len(deleted) == 4
    assert objects(store) == {}


def test_a_large_file_may_take_longer_than_a_request(store, monkeypatch):
    monkeypatch.setattr(client, "LEAST_BYTES_A_SECOND", 1000)
    given, sync = [], client.sync

    def note(loop, method, *arguments, timeout, **options):
        given.append((str(arguments[0]).rpartition("/")[2], timeout))
        return sync(loop, method, *arguments, timeout=timeout, **options)

    monkeypatch.setattr(client, "sync", note)
    with store.staged(1) as folder:
        (folder / "checkpoint.json").write_text("{}")
        (folder / "large").write_bytes(bytes(5000))
        name = store.commit(folder, lambda: None)
    with store.opened(name) as folder:
        assert (folder / "large").stat().st_size == 5000
    assert [seconds for name, seconds in given if name == "large"] == [65.0, 65.0], "put and got"


def test_a_full_disk_here_is_said_at_once_and_is_no_fault_of_the_store(store, monkeypatch):
    saved(store, 1)
    asked = []

    async def full(url, target, **options):
        asked.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._client.fs, "_get_file", full)
    with pytest.raises(OSError, match="No space left"), store.opened(store.names()[0]):
        pass
    assert len(asked) == 1


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    def absent(*arguments, **options):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(client.fsspec, "filesystem", absent)
    with pytest.raises(UserError, match=r"'s3://b/p': s3:// needs a package .* minilm-distiller\[remote\]"):
        ObjectStore("s3://b/p", tmp_path)


def test_a_store_that_is_down_costs_a_save_but_not_the_run(store, server, caplog):
    models, states = make(0)
    saver = AsyncSaver(store, models, states, MINE, keep=2, keep_every=None, fence=Fence(""))
    server.fault = lambda method, path: "500"
    saver.save(1, FACTS, lambda copy: None, must=False)
    saver.wait()
    assert saver.given_up == 1 and "step 1 is NOT saved (1 saves given up so far)" in caplog.text
    saver.save(2, FACTS, lambda copy: None)
    with pytest.raises(StoreUnavailable):
        saver.wait()
    server.fault = lambda method, path: None
    saver.save(3, FACTS, lambda copy: None, must=False)
    saver.wait()
    assert [step_of(name) for name in store.names()] == [3]


def test_steps_go_on_while_a_store_is_slow(shards, teacher, server, tmp_path):
    """The first save's upload stands still until the loop is ten steps further: if the loop waited for it, neither
    would ever end."""
    gate = threading.Event()
    seen = []

    def hold(method, path):
        return (lambda: gate.wait(60)) if method == "PUT" and "step-" in path else None

    def on_step(step):
        seen.append(step)
        if step == 13:
            gate.set()

    server.fault = hold
    url = f"s3://bucket/slow-{tmp_path.name}"
    spec = make_spec(shards, teacher, tmp_path, steps=16, checkpoints=url, checkpoint_every_steps=3)
    assert run_stage(spec, on_step)
    steps = [step_of(name) for name in open_store(url, tmp_path / "room").names()]
    assert steps[-1] == 16 and not set(steps) & set(range(4, 13))


def test_metrics_and_heartbeats_ask_the_store_nothing(shards, teacher, server, tmp_path):
    """The loop would wait for the answer, and a store that is away for a while would end the run."""
    asked = []
    url = f"s3://bucket/quiet-{tmp_path.name}"
    spec = make_spec(
        shards, teacher, tmp_path, checkpoints=url, checkpoint_every_steps=None, log_every=1, eval_every=4
    )
    assert run_stage(spec, lambda step: asked.append(len(server.requests)))
    assert len(set(asked[:-1])) == 1, f"requests after each step: {asked}"  # the last one is saved


def test_the_stage_goes_on_elsewhere_with_the_url_alone(shards, teacher, server, tmp_path):
    url = f"s3://bucket/lost-{tmp_path.name}"
    whole = make_spec(shards, teacher, tmp_path / "whole")
    assert run_stage(whole)

    def stop_at_7(step):
        if step == 7:
            StageFolder(tmp_path / "first").stop_request.touch()
            time.sleep(0.6)

    assert not run_stage(make_spec(shards, teacher, tmp_path / "first", checkpoints=url), stop_at_7)
    seen = []
    assert run_stage(make_spec(shards, teacher, tmp_path / "second", checkpoints=url), seen.append)
    assert seen[0] in (8, 9)
    done = [json.loads(StageFolder(tmp_path / which).done.read_text()) for which in ("whole", "second")]
    assert done[0] == done[1]
    assert run_stage(make_spec(shards, teacher, tmp_path / "third", checkpoints=url), seen.append)
    assert json.loads(StageFolder(tmp_path / "third").done.read_text()) == done[0]
    assert seen[-1] == 12 and seen.count(12) == 1  # exported again, not trained again


def test_whoever_claimed_last_saves(shards, teacher, server, tmp_path):
    url = f"s3://bucket/two-{tmp_path.name}"
    store = open_store(url, tmp_path / "room")
    store.claim("first")

    def taken_over(step):
        if step == 4:
            while not store.names():
                time.sleep(0.05)
            store.claim("second")

    spec = make_spec(shards, teacher, tmp_path, checkpoints=url, attempt="first")
    with pytest.raises(LeaseHeld, match=r"another run \(second\) has taken over the checkpoints in s3://"):
        run_stage(spec, taken_over)
    assert [step_of(name) for name in store.names()] == [3]
    assert not run_reporting(spec)
    assert json.loads(StageFolder(tmp_path).failure.read_text())["exit_code"] == 6


def test_folders_and_file_urls_are_local(tmp_path):
    for place in (str(tmp_path / "a"), f"file://{tmp_path / 'a'}", None):
        store = open_store(place, tmp_path / "a")
        assert isinstance(store, LocalStore) and store.folder == tmp_path / "a"
