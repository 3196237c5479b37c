"""The bench runs, and its table and JSON say the same."""

import json

from minilm.orchestrator.bench.stream import bench_stream


def test_the_bench_times_every_reader(tmp_path):
    found = bench_stream(rows=3000, seq_len=64, micro_batch=64, seconds=0.02, repeats=1, folder=tmp_path)
    told = json.loads(found.json())
    names = [speed["reader"] for speed in told["speeds"]]
    ours = {f"{name}, {size}" for name in ("gather", "gather alone", "stream") for size in (16, 64, 256)}
    assert {"memcpy", "random copies", "batches", "webdataset blocks", "webdataset rows"} | ours <= set(names)
    assert all(speed["rows_per_second"] > 0 for speed in told["speeds"])
    assert all(name in found.text() for name in names) and "share of memcpy" in found.text()
    assert list(told["gather_shares"]) == list(told["alone_shares"]) == ["16", "64", "256"]
    assert min(*found.gather_shares.values(), *found.alone_shares.values(), found.copies_share) > 0
    assert found.best_other > 1


def test_the_gather_that_is_timed_makes_the_calls_of_a_stream(tmp_path):
    found = bench_stream(rows=3000, seq_len=64, micro_batch=300, seconds=0.01, repeats=1, folder=tmp_path)
    notes = {speed.reader: speed.note for speed in found.speeds}
    assert [notes[f"gather, {size}"] for size in (75, 300, 1200)] == [
        f"random rows, up to {most} a call" for most in ("2,100", "2,100", "2,400")
    ]
