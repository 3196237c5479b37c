"""The stream as a torch dataset: same rows, exact positions, other people's loops."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from minilm.data.errors import DataError
from minilm.data.stream import Stream
from minilm.data.torch_dataset import StreamDataset
from tests.data_cases import make_data
from tests.support import crowded_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("torch"))


def dataset(data, **options):
    return StreamDataset(data, **{"seed": 3, "batch": 12, "micro_batch": 3, "num_steps": 6, **options})


def rows(elements):
    return [element["row_ids"].tolist() for element in elements]


def test_a_plain_data_loader_gives_the_streams_micro_batches(data):
    stream = Stream(data, seed=3, batch=12, micro_batch=3)
    wanted = [stream.micro_batch(step, i) for step in range(6) for i in range(4)]
    found = list(DataLoader(dataset(data), batch_size=None, num_workers=0))
    assert rows(found) == [batch.row_ids.tolist() for batch in wanted]
    assert [element["step"] for element in found] == [step for step in range(6) for _ in range(4)]
    assert all(torch.equal(a["input_ids"], b.input_ids) for a, b in zip(found, wanted, strict=True))
    assert found[0]["attention_mask"].dtype == torch.bool and found[0]["attention_mask"].all()


def test_masks_of_padded_rows(tmp_path):
    element = next(iter(dataset(make_data(tmp_path, packing="document"), batch=48, micro_batch=48)))
    assert torch.equal(element["attention_mask"], element["input_ids"] != 0)


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 23])
def test_a_saved_position_goes_on_exactly(data, taken):
    whole = rows(dataset(data))
    first = dataset(data)
    assert rows(itertools.islice(first, taken)) == whole[:taken]
    state = json.loads(json.dumps(first.state_dict()))
    second = dataset(data)
    second.load_state_dict(state)
    assert len(second) == 24 - taken
    assert rows(second) == whole[taken:]


def test_a_megatron_style_loop_with_changing_ranks(data):
    """Each rank asks its own iterator for its micro-batches; after two steps the world shrinks."""
    whole = rows(dataset(data))
    found = []
    for begin, end, world in ((0, 2, 3), (2, 6, 2)):
        ranks = [dataset(data, rank=rank, world_size=world) for rank in range(world)]
        for worker in ranks:
            worker.set_step(begin)
        iterators = [iter(worker) for worker in ranks]
        for _ in range(begin, end):
            for worker, iterator in zip(ranks, iterators, strict=True):
                mine = len(worker) // (6 - worker.state_dict()["step"])
                found += rows(itertools.islice(iterator, mine))
        for iterator in iterators:
            iterator.close()
    assert found == whole


def test_positions_of_other_streams_are_refused(data):
    state = dataset(data).state_dict()
    for options in ({"seed": 4}, {"batch": 24}, {"micro_batch": 4}, {"window": 1}):
        with pytest.raises(DataError, match=r"belongs to another stream: \w+ was .*, is .* now"):
            dataset(data, **options).load_state_dict(state)
    halfway = dataset(data)
    list(itertools.islice(halfway, 6))
    with pytest.raises(DataError, match=r"inside step 1 .*go back to its begin with set_step\(1\)"):
        dataset(data, world_size=2).load_state_dict(halfway.state_dict())


def test_worker_processes_are_refused(data):
    with pytest.raises(DataError, match=r"use DataLoader\(…, num_workers=0\)"):
        next(iter(DataLoader(dataset(data), batch_size=None, num_workers=1)))


def test_a_loop_of_somebody_elses_with_files_of_our_names(data, tmp_path):
    """As in Megatron and fairseq, whose own top-level package is called `data`."""
    folder = crowded_folder(tmp_path / "user")
    program = (
        "from minilm.data.torch_dataset import StreamDataset\n"
        f"rows = StreamDataset({str(data)!r}, seed=3, batch=12, micro_batch=3, num_steps=6)\n"
        "print(next(iter(rows))['row_ids'].tolist())"
    )
    (folder / "loop.py").write_text(program)
    done = subprocess.run([sys.executable, "loop.py"], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == next(iter(dataset(data)))["row_ids"].tolist()
