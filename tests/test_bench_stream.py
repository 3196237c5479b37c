"""The bench runs, and its table and JSON say the same."""

import json

from minilm.orchestrator.bench.stream import bench_stream


def test_the_bench_times_every_reader(tmp_path):
    found = bench_stream(rows=3000, seq_len=64, micro_batch=64, seconds=0.02, repeats=1, folder=tmp_path)
    told = json.loads(found.json())
    names = [speed["reader"] for speed in told["speeds"]]
    ours = {f"{name}, {size}" for name in ("read", "stream") for size in (16, 64, 256)}
    assert {"memcpy", "webdataset blocks", "webdataset rows"} | ours <= set(names)
    assert all(speed["rows_per_second"] > 0 for speed in told["speeds"])
    assert all(name in found.text() for name in names)
    assert found.best_other > 1 and f"read is {found.best_other:,.1f} times as fast" in found.text()
