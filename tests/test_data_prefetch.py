"""Micro-batches read ahead: the same batches, windows, errors and counts as one after the other."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.indexed_dataset import IndexedRows
from minilm.data.read.prefetch import prefetch
from minilm.data.read.reader import RowReader
from minilm.data.read.row_range import RowRange
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream
from tests.data_cases import (
    make_data,
    make_documents,
    make_tokenizer,
    prefetch_threads,
    write_megatron,
)

SEED, BATCH, MICRO_BATCH = 3, 12, 3


class Recorder:
    """Writes down what is asked of `rows`, which answer; `bad` is a row that cannot be read."""

    def __init__(self, rows, bad=None):
        self.rows, self.bad, self.calls = rows, bad, []

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def enter_window(self, current, coming):
        self.calls.append(("window", current.tolist(), coming.tolist()))
        self.rows.enter_window(current, coming)

    def read(self, row_ids):
        self.calls.append(("read", np.asarray(row_ids).tolist()))
        if self.bad is not None and self.bad in self.calls[-1][1]:
            raise DataError(f"row {self.bad} among {len(row_ids)}")
        return self.rows.read(row_ids)

    def reads(self):
        return [call[1] for call in self.calls if call[0] == "read"]

    def intervals(self):
        """The windows that were entered, each with the rows that were read in it."""
        found = [[None, []]]
        for kind, *what in self.calls:
            if kind == "window":
                found.append([what, []])
            else:
                found[-1][1].extend(what[0])
        return found


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("full"), documents=300)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("padded"), documents=100, packing="document")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    teacher = make_tokenizer(folder / "tokenizer")
    encoder = AutoTokenizer.from_pretrained(teacher)
    documents = [[encoder.encode(d, add_special_tokens=False)] for d in make_documents(80)]
    prefix = write_megatron(folder / "pair", documents)
    return IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)


def source(kind, full, padded, pair):
    return {
        "full": lambda: [RowReader(full)],
        "padded": lambda: [RowReader(padded)],
        "pair": lambda: [pair],
        "part of a pair": lambda: [RowRange(pair, 5, pair.num_rows - 9)],
        "mixture": lambda: [RowReader(full), RowReader(padded), RowRange(pair, 1, 40)],
    }[kind]()


def stream_of(rows, **options):
    weights = (0.5, 0.3, 0.2)
    corpora = [Corpus(part, weight) for part, weight in zip(rows, weights, strict=False)]
    return Stream(corpora, **{"seed": SEED, "batch": BATCH, "micro_batch": MICRO_BATCH, **options})


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.row_ids, other.row_ids)
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("kind", ["full", "padded", "pair", "part of a pair", "mixture"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("mine", [range(4), range(1, 3), range(3, -1, -2)])
def test_the_same_batches_as_one_after_the_other(full, padded, pair, kind, window, mine):
    rows = [Recorder(part) for part in source(kind, full, padded, pair)]
    stream = stream_of(rows, window=window)
    first, steps = 5, 5 + 1500 // (len(mine) * MICRO_BATCH)
    before = stream.counters.rows
    found = list(stream.iterate(first, steps, mine))
    rows_read = stream.counters.rows - before
    alone = stream_of(source(kind, full, padded, pair), window=window)
    wanted = [alone.micro_batch(step, index) for step in range(first, steps) for index in mine]
    assert_same(found, wanted)
    assert rows_read == len(wanted) * MICRO_BATCH
    if kind in ("padded", "mixture"):
        assert {batch.mask is None for batch in found} == {True, False}


@pytest.mark.parametrize("window", [1, 3])
def test_a_reader_hears_of_a_window_before_its_rows_and_after_those_of_the_last(full, padded, window):
    recorders = [Recorder(RowReader(full)), Recorder(RowReader(padded))]
    list(stream_of(recorders, window=window).iterate(0, 150, range(4)))
    for recorder, folder in zip(recorders, (full, padded), strict=True):
        manifest = load_manifest(folder)
        rows_per_shard = manifest.rows_per_block * manifest.blocks_per_shard
        (first, rows), *intervals = recorder.intervals()
        assert first is None and rows == [] and len(intervals) > 4
        for number, ((current, coming), rows) in enumerate(intervals[:-1]):
            assert intervals[number + 1][0][0] == coming
            shards = {row // rows_per_shard for row in rows}  # a micro-batch may reach into the next window
            assert set(current) <= shards <= {*current, *coming}


def new_row(stream, corpus):
    """A micro-batch between the 500th and the 700th, and a row that it is the first to bring."""
    seen, found = set(), None
    for number in range(700):
        for address in stream.addresses(*divmod(number, 4)):
            if address.corpus == corpus and address.row not in seen:
                seen.add(address.row)
                found = found or ((number, address.row) if number >= 500 else None)
    return found


@pytest.mark.parametrize("mixed", [False, True])
def test_an_error_comes_after_all_micro_batches_before_it_and_with_the_text_of_its_own(full, padded, mixed):
    def opened(bad):
        rows = (
            [RowReader(padded), Recorder(RowReader(full), bad)] if mixed else [Recorder(RowReader(full), bad)]
        )
        return stream_of(rows), rows[-1]

    number, bad = new_row(opened(None)[0], corpus=int(mixed))
    stream, _ = opened(bad)
    found = []
    with pytest.raises(DataError) as caught:
        for batch in stream.iterate(0, 300, range(4)):
            found.append(batch)
    assert len(found) == number
    with pytest.raises(DataError) as expected:
        opened(bad)[0].micro_batch(*divmod(number, 4))
    assert str(caught.value) == str(expected.value)


def test_few_micro_batches_are_read_before_they_are_taken(full):
    recorder = Recorder(RowReader(full))
    batches = stream_of([recorder]).iterate(0, 10**6, range(4))
    for _ in range(50):
        next(batches)
    batches.close()
    assert 50 <= len(recorder.reads()) <= 50 + 4


def test_items_come_in_order_and_then_the_error():
    def items():
        yield from range(4)
        raise KeyError("four")

    found = []
    with pytest.raises(KeyError, match="four"):
        for item in prefetch(items(), 2):
            found.append(item)
    assert found == [0, 1, 2, 3]
    assert list(prefetch(iter([]), 1)) == [] and list(prefetch(iter([1, None, 2]), 9)) == [1, None, 2]


def test_items_are_worked_out_ahead_and_closing_ends_the_thread():
    begun = []
    sixth = threading.Event()

    def items():
        for number in range(1000):
            begun.append(number)
            if number == 5:
                sixth.set()
            yield number

    before = prefetch_threads()
    ahead = prefetch(items(), 5)
    assert next(ahead) == 0
    assert sixth.wait(5)
    for number in range(1, 101):
        assert next(ahead) == number
        assert len(begun) <= number + 1 + 5
    assert len(prefetch_threads() - before) == 1
    ahead.close()
    assert not prefetch_threads() - before
