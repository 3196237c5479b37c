"""The data layer's promises as a whole: resuming costs nothing, memory does not grow, kills change nothing."""

import hashlib
import json
import os
import random
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minilm.data.format.manifest import Manifest, TokenizerInfo, load_manifest, save_manifest
from minilm.data.format.shard import blocks_for
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream, partition
from tests.data_cases import make_data

TOKENIZER = TokenizerInfo("0" * 64, 30522, 101, 102, 0, 100, 103)
STEPS, BATCH, MICRO_BATCH, CHECKPOINT_EVERY = 60, 24, 4, 5


def simulated(folder, num_rows, seq_len=512):
    """The manifest of a data set whose shards do not exist."""
    blocks = blocks_for(128 << 20, seq_len, "uint16", 1024, False)
    num_shards = -(-num_rows // (1024 * blocks))
    hashes = tuple(hashlib.sha256(str(i).encode()).hexdigest() for i in range(num_shards))
    pins = tuple(digest[:16] for digest in hashes)
    folder.mkdir()
    save_manifest(
        Manifest(
            seq_len, "uint16", "full", num_rows, num_rows * seq_len, 1024, blocks, TOKENIZER, hashes, pins
        ),
        folder / "manifest.json",
    )
    return folder


def test_ten_billion_rows_open_at_once_and_cost_no_more_memory(tmp_path):
    big, small = simulated(tmp_path / "big", 10**10), simulated(tmp_path / "small", 10**5)
    raw, opened, read = (big / "manifest.json").read_bytes(), [], []
    for _ in range(5):
        begin = time.process_time()  # the clock of a busy machine tells of others
        stream = Stream(big, seed=1, batch=1024, micro_batch=64)
        opened.append(time.process_time() - begin)
        begin = time.process_time()
        hashlib.sha256(json.dumps(json.loads(raw)).encode())
        read.append(time.process_time() - begin)
    assert min(opened) < 4 * min(read), "little more than reading the manifest takes"
    used = {}
    for folder in (big, small):
        stream = Stream(folder, seed=1, batch=1024, micro_batch=64)
        tracemalloc.start()
        for step in range(0, 400_000, 20_000):
            stream.row_ids(step, 3)
        used[folder.name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used["big"] < 1.5 * used["small"] + 4096


def test_the_order_of_ten_billion_rows_is_no_slower(tmp_path):
    folders = [simulated(tmp_path / str(num_rows), num_rows) for num_rows in (10**4, 10**10)]
    streams = [Stream(folder, seed=1, batch=4096, micro_batch=4096) for folder in folders]
    times = [[], []]
    for step in range(30):  # in turns: a busy machine is busy for both
        for stream, taken in zip(streams, times, strict=True):
            begin = time.perf_counter()
            stream.row_ids(step, 0)
            taken.append(time.perf_counter() - begin)
    small, big = map(min, times)
    assert big < 2 * small


def opened_until_first_batch(folder, step):
    """(files opened, bytes asked of read calls) from nothing to the first batch of `step`, in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        opened = 0

        def hook(event, arguments):
            nonlocal opened
            opened += event == "open"

        sys.addaudithook(hook)
        before = read_bytes()
        stream = Stream(folder, seed=1, batch=64, micro_batch=64)
        stream.micro_batch(step, 0)
        count = opened
        os.write(send, f"{count} {read_bytes() - before}".encode())
        os._exit(0)
    os.close(send)
    answer = os.read(receive, 100)
    os.close(receive)
    os.waitpid(child, 0)
    return tuple(map(int, answer.split()))


def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_resuming_costs_the_same_at_any_step(tmp_path):
    folder = make_data(tmp_path, documents=60, shard_bytes=1 << 20, rows_per_block=1024)
    assert load_manifest(folder).num_blocks == 1  # any step compares the same checksum
    first = opened_until_first_batch(folder, 0)
    late = opened_until_first_batch(folder, 399_999)
    assert first[0] == late[0] <= 8
    assert abs(first[1] - late[1]) < 64  # /proc/self/io itself varies by digits


class World:
    """A run that is killed and goes on: worker processes write a line for every micro-batch they consumed."""

    def __init__(self, source, folder, **options):
        self.open = lambda: Stream(source(), seed=9, batch=BATCH, micro_batch=MICRO_BATCH, **options)
        self.folder = folder
        self.attempt = 0

    def work(self, path, first_step, rank, world_size):
        stream = self.open()
        mine = partition(stream.num_micro_batches, rank, world_size)
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        step, index = first_step, 0
        for batch in stream.iterate(first_step, STEPS, mine):
            digest = hashlib.sha256(batch.input_ids.numpy().tobytes() + batch.row_ids.numpy().tobytes())
            os.write(file, f"{step} {mine[index]} {digest.hexdigest()}\n".encode())
            step, index = (step + 1, 0) if index + 1 == len(mine) else (step, index + 1)
            time.sleep(0.0005)

    def start(self, first_step, world_size):
        self.attempt += 1
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    self.work(self.folder / f"{self.attempt}-{rank}", first_step, rank, world_size)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        return children

    def consumed(self):
        """{(step, micro-batch): digest}; a replay that differs from what it replays is a failure."""
        found = {}
        for path in self.folder.iterdir():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    step, index, digest = line.split()
                    assert found.setdefault((int(step), int(index)), digest) == digest
        return found

    def first_missing_step(self):
        found = self.consumed()
        steps = (step for step in range(STEPS) for i in range(BATCH // MICRO_BATCH) if (step, i) not in found)
        return next(steps, STEPS)


def run_with_kills(source, folder, rounds, seed, **options):
    """Kill `rounds` times at random instants; how often workers really died before they were done."""
    rng = random.Random(seed)
    whole, broken = World(source, folder / "whole", **options), World(source, folder / "broken", **options)
    for world in (whole, broken):
        world.folder.mkdir()
    for child in whole.start(0, 1):
        assert os.waitpid(child, 0)[1] == 0
    killed = 0
    for _ in range(rounds):
        step = broken.first_missing_step() // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        if step >= STEPS:
            for path in broken.folder.iterdir():
                path.unlink()
            step = 0
        children = broken.start(step, rng.randint(1, 5))
        time.sleep(rng.uniform(0, 0.06))
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += sum(os.waitpid(child, 0)[1] == signal.SIGKILL for child in children)
        whole_lines = whole.consumed()
        assert all(whole_lines[key] == digest for key, digest in broken.consumed().items())
    step = broken.first_missing_step() // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    for child in broken.start(step, 3):
        assert os.waitpid(child, 0)[1] == 0
    assert broken.consumed() == whole.consumed()
    assert len(whole.consumed()) == STEPS * BATCH // MICRO_BATCH
    return killed


def mixed_corpora(one, two):
    return [Corpus(RowReader(one), 2), Corpus(RowReader(two), 1)]


def test_kills_and_other_worker_counts_change_nothing(tmp_path):
    data = make_data(tmp_path / "d", documents=40)
    assert run_with_kills(lambda: data, tmp_path, rounds=16, seed=1) > 4


def test_kills_change_nothing_in_a_windowed_mixture(tmp_path):
    one = make_data(tmp_path / "one", documents=40)
    two = make_data(tmp_path / "two", documents=20, packing="document", seed=2)
    assert run_with_kills(lambda: mixed_corpora(one, two), tmp_path, rounds=8, seed=2, window=1) > 2


@pytest.mark.soak
def test_two_hundred_kills_change_nothing(tmp_path):
    data = make_data(tmp_path / "d", documents=40)
    killed = run_with_kills(lambda: data, tmp_path, rounds=200, seed=3)
    print(f"200 rounds, {killed} workers killed in their work")
    assert killed > 50


def test_random_shapes_and_schedules(tmp_path):
    """Random rows, block, window, batch, seed; the worker count changes at random steps: rows equal W = 1's."""
    rng = random.Random(7)
    for case in range(12):
        folder = simulated(tmp_path / str(case), rng.randint(1, 5000))
        micro = rng.randint(1, 9)
        options = {"seed": rng.randrange(1 << 64), "micro_batch": micro, "batch": micro * rng.randint(1, 9)}
        if case % 2:
            options["window"] = rng.randint(1, 4)
        alone = Stream(folder, **options)
        wanted = [alone.row_ids(step, i) for step in range(30) for i in range(alone.num_micro_batches)]
        found = []
        for step in range(30):
            world = rng.randint(1, 12)
            for rank in range(world):
                worker = Stream(folder, **options)
                found += [worker.row_ids(step, i) for i in partition(worker.num_micro_batches, rank, world)]
        assert np.array_equal(np.concatenate(found), np.concatenate(wanted))
        epoch = np.concatenate(wanted)[: load_manifest(folder).rows]
        assert len(np.unique(epoch)) == len(epoch)
