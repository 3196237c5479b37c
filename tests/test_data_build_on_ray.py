"""A build on a Ray cluster gives the bytes of a build on this machine, and says what a cluster lacks."""

import json
import shutil
from pathlib import Path

import pytest
import ray

from minilm.data.builder.build import build
from minilm.data.builder.ray_pool import run_tasks_on_ray
from minilm.data.errors import DataError
from tests.data_cases import make_documents, make_tokenizer

SMALL = {"seq_len": 16, "rows_per_block": 8, "shard_bytes": 20_000, "held_out": 0.2}


@pytest.fixture(scope="module")
def cluster():
    root = str(Path(__file__).parent.parent)
    ray.init(
        "local",  # else it joins whatever cluster this machine has
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


def test_a_build_on_ray_gives_the_same_bytes_and_the_same_errors(cluster, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"t": d}) + "\n" for d in make_documents(60)))
    seen = []
    far = build([text], tokenizer, tmp_path / "far", on_ray=True, progress=seen.append, **SMALL)
    near = build([text], tokenizer, tmp_path / "near", processes=1, **SMALL)
    assert far.fingerprint == near.fingerprint and seen[-1].share == 1
    for name in ("shard-000000.tar", "blocks.xxh3", "held-out/shard-000000.tar", "manifest.json"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    with text.open("a") as file:
        file.write('{"t": "more"}\n' * 300 + "{broken\n")
    with pytest.raises(DataError, match=r"text\.jsonl', byte \d+: not JSON"):
        build([text], tokenizer, tmp_path / "bad", on_ray=True, **SMALL)
    assert not (tmp_path / "bad").exists()
    shutil.rmtree(tmp_path / "far")
    with pytest.raises(
        DataError, match=r"node .* does not see '.*far'; build on a cluster needs an output folder"
    ):
        tasks = [("tokenize", {"folder": str(tmp_path / "far"), "unit": 0})]
        list(run_tasks_on_ray(tasks, lambda: None))
