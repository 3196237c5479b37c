"""The bench runs, and its table and JSON say the same."""

import json

from data.bench_stream import bench_stream


def test_the_bench_times_every_reader(tmp_path):
    found = bench_stream(rows=3000, seq_len=64, micro_batch=64, seconds=0.02, repeats=1, folder=tmp_path)
    told = json.loads(found.json())
    names = [speed["reader"] for speed in told["speeds"]]
    assert {"memcpy", "gather", "batches", "stream", "webdataset blocks", "webdataset rows"} <= set(names)
    assert all(speed["rows_per_second"] > 0 for speed in told["speeds"])
    assert all(name in found.text() for name in names) and "of memcpy" in found.text()
    assert found.copies_share > 0 and found.gather_share > 0 and found.best_other > 1
