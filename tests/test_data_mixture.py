"""Mixed corpora: weights met, counters of their own, a pure function, frozen."""

import shutil

import numpy as np
import pytest
import torch

from minilm.data.errors import DataError
from minilm.data.order.mixture import PERIOD, make_schedule
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream
from tests.data_cases import make_data, make_documents, make_tokenizer

# Never change these: runs and checkpoints rely on them.
GOLDEN_TWO = [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
GOLDEN_THREE = [2, 2, 1, 2, 2, 1, 2, 0, 2, 2, 1, 2]
GOLDEN_COUNTERS = [30717, 30718, 12287, 30719, 30720, 12288, 30721, 6144, 30722, 30723, 12289, 30724]


def run(first, count):
    return np.arange(first, first + count)


def test_golden_schedule():
    assert make_schedule([0.7, 0.3]).at(run(0, 20))[0].tolist() == GOLDEN_TWO
    assert make_schedule([1, 2, 5]).at(run(3 * PERIOD - 4, 12))[0].tolist() == GOLDEN_THREE
    assert make_schedule([1, 2, 5]).at(run(3 * PERIOD - 4, 12))[1].tolist() == GOLDEN_COUNTERS


@pytest.mark.parametrize(
    "weights", [[1], [0.7, 0.3], [1, 1, 1], [0.1, 0.2, 0.3, 0.4], [1, 1000], [3, 1e-3 * 7]]
)
def test_counters_count_and_weights_are_met_everywhere(weights):
    schedule = make_schedule(weights)
    corpus, counters = schedule.at(run(0, 2 * PERIOD))
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        mine = corpus == number
        assert np.array_equal(counters[mine], np.arange(mine.sum()))
        ideal = share * np.arange(1, 2 * PERIOD + 1)
        assert np.abs(np.cumsum(mine) - ideal).max() < 2 + len(weights) / 2
    assert np.array_equal(schedule.at(run(777, 100))[1], counters[777:877])


def test_position_is_the_inverse():
    schedule = make_schedule([5, 2, 1])
    corpus, counters = schedule.at(run(0, 3 * PERIOD))
    for place in range(0, 3 * PERIOD, 997):
        assert schedule.position(int(corpus[place]), int(counters[place])) == place


def test_weights_are_scale_free():
    assert np.array_equal(make_schedule([0.7, 0.3]).corpus, make_schedule([7, 3]).corpus)


def test_bad_weights_are_refused():
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"weight .* of corpus 2 is not positive; give a number above 0"):
            make_schedule([1, weight])
    with pytest.raises(DataError, match=r"weight 1e-09 of corpus 1 is less than 1/16384 of all"):
        make_schedule([1e-9, 1])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    first = make_data(folder / "first", documents=40)
    second = make_data(folder / "second", documents=25, packing="document", seed=4)
    return first, second


def mixed(two, weights=(0.7, 0.3), **options):
    corpora = [Corpus(RowReader(folder), weight) for folder, weight in zip(two, weights, strict=True)]
    return Stream(corpora, **{"seed": 3, "batch": 20, "micro_batch": 5, **options})


def test_a_batch_holds_the_corpora_by_weight_and_their_rows(two):
    stream = mixed(two)
    first, second = (RowReader(folder) for folder in two)
    everything = torch.cat([r.read(range(r.num_rows)).input_ids for r in (first, second)])
    for step in (0, 5):
        batches = [stream.micro_batch(step, index) for index in range(4)]
        ids = torch.cat([batch.row_ids for batch in batches])
        assert (ids >= first.num_rows).sum() == 6
        assert torch.equal(torch.cat([batch.input_ids for batch in batches]), everything[ids])
        for batch in batches:
            if batch.mask is not None:
                assert torch.equal(batch.mask, batch.input_ids != first.tokenizer.pad_id)


def test_every_corpus_keeps_its_own_exact_epochs_and_order(two):
    stream, heavier = mixed(two), mixed(two, weights=(0.2, 0.8))
    first = RowReader(two[0]).num_rows

    def rows_of(stream, number):
        ids = np.concatenate([stream.row_ids(step, i) for step in range(200) for i in range(4)])
        return ids[(ids >= first) == bool(number)]

    for number, folder in enumerate(two):
        size = RowReader(folder).num_rows
        rows = rows_of(stream, number)
        assert len(np.unique(rows[:size])) == size and len(np.unique(rows[size : 2 * size])) == size
        other = rows_of(heavier, number)
        common = min(len(rows), len(other))
        assert np.array_equal(rows[:common], other[:common])


def test_where_a_row_is_read(two):
    for stream in (
        mixed(two),
        mixed(two, window=1),
        Stream(two[0], seed=1, batch=20, micro_batch=5, window=2),
    ):
        for row in (0, 17, stream.corpora[0].rows.num_rows - 1):
            step, place = stream.position(row, 2)
            assert stream.row_ids(step, place // 5)[place % 5] == row
    with pytest.raises(DataError, match=r"row 99999 does not exist; these data have rows 0 to \d+"):
        mixed(two).position(99999, 0)


def test_fingerprints_tell_data_and_weights_apart(two):
    assert mixed(two).fingerprint == mixed(two).fingerprint
    assert mixed(two).fingerprint != mixed(two, weights=(0.6, 0.4)).fingerprint
    assert Stream(two[0], seed=1, batch=1, micro_batch=1).fingerprint == RowReader(two[0]).fingerprint


def test_corpora_that_do_not_fit_are_refused(two, tmp_path):
    other = make_data(tmp_path / "long", documents=40, seq_len=32)
    with pytest.raises(DataError, match=r"corpus 2 has rows of 32 tokens, the first one of 16"):
        mixed((two[0], other))
    with pytest.raises(DataError, match="no corpus was given"):
        Stream([], seed=0, batch=1, micro_batch=1)
    from minilm.data.builder.build import build

    tokenizer = make_tokenizer(tmp_path / "tokenizer", extra_tokens=1)
    (tmp_path / "text.txt").write_text("\n\n".join(make_documents(10)))
    build([tmp_path / "text.txt"], tokenizer, tmp_path / "other", seq_len=16, processes=1)
    with pytest.raises(DataError, match="corpus 2 was tokenized with another vocabulary"):
        mixed((two[0], tmp_path / "other"))
    shutil.rmtree(tmp_path)
