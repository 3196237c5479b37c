"""Several micro-batches read at once: the same batches, announcements, errors and counts as one after the other."""

import os
import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.indexed_dataset import IndexedRows
from minilm.data.read.prefetch import read_ahead
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.row_range import RowRange
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream
from tests.data_cases import (
    in_a_child,
    make_data,
    make_documents,
    make_tokenizer,
    reading_ahead,
    write_megatron,
)

SEED, BATCH, MICRO_BATCH = 3, 12, 3


class ProgressListener:
    """Rows that write down what is asked of them; `bad`: a row that cannot be read. Leaves the rest to `rows`."""

    def __init__(self, rows, bad=None):
        self.rows, self.bad, self.calls = rows, bad, []

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def announce(self, current, coming):
        self.calls.append(("announce", current.tolist(), coming.tolist()))
        self.rows.announce(current, coming)

    def read(self, row_ids):
        self.calls.append(("read", np.asarray(row_ids).tolist()))
        if self.bad is not None and self.bad in self.calls[-1][1]:
            raise DataError(f"row {self.bad} among {len(row_ids)}")
        return self.rows.read(row_ids)

    def reads(self):
        return [call[1] for call in self.calls if call[0] == "read"]

    def intervals(self):
        """What is announced, with the rows that are read until the next announcement."""
        found = [[None, []]]
        for kind, *what in self.calls:
            if kind == "announce":
                found.append([what, []])
            else:
                found[-1][1].extend(what[0])
        return found


def warm(folder, **options):
    """A reader that has mapped and compared all there is."""
    reader = RowReader(folder, **options)
    reader.read(range(reader.num_rows))
    return reader


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
        "full": lambda: [warm(full)],
        "padded": lambda: [warm(padded)],
        "pair": lambda: [pair],
        "part of a pair": lambda: [RowRange(pair, 5, pair.num_rows - 9)],
        "mixture": lambda: [warm(full), warm(padded), RowRange(pair, 1, 40)],
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
    rows = [ProgressListener(part) for part in source(kind, full, padded, pair)]
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
    sizes = [len(rows) for rows in rows[0].reads()]
    assert sizes[0] <= MICRO_BATCH < max(sizes) <= 2048 + MICRO_BATCH
    if window is None:
        assert len(sizes) < len(wanted) / 20


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_is_announced_before_its_rows_and_after_those_of_the_last(full, padded, window):
    seen = []
    for at_once in (True, False):
        rows = [ProgressListener(warm(full)), ProgressListener(warm(padded))]
        stream = stream_of(rows, window=window)
        if at_once:
            list(stream.iterate(0, 150, range(4)))
            assert max(map(len, rows[0].reads())) > 4 * MICRO_BATCH
        else:
            for step in range(150):
                for index in range(4):
                    stream.micro_batch(step, index)
        seen.append([part.intervals() for part in rows])
    assert seen[0] == seen[1]
    assert len(seen[0][0]) > 4


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
def test_an_error_comes_behind_all_micro_batches_before_it_and_with_the_text_of_its_own(full, padded, mixed):
    def opened(bad):
        rows = (
            [warm(padded), ProgressListener(warm(full), bad)]
            if mixed
            else [ProgressListener(warm(full), bad)]
        )
        return stream_of(rows), rows[-1]

    number, bad = new_row(opened(None)[0], corpus=int(mixed))
    stream, told = opened(bad)
    found = []
    with pytest.raises(DataError) as caught:
        for batch in stream.iterate(0, 300, range(4)):
            found.append(batch)
    assert len(found) == number
    with pytest.raises(DataError) as expected:
        opened(bad)[0].micro_batch(*divmod(number, 4))
    assert str(caught.value) == str(expected.value)
    assert max(map(len, told.reads())) > 4 * MICRO_BATCH


def test_what_was_not_compared_yet_is_read_one_after_the_other(full):
    told = ProgressListener(RowReader(full))
    list(stream_of([told]).iterate(0, 2, range(4)))
    assert {len(rows) for rows in told.reads()} == {MICRO_BATCH}


def test_a_shard_that_is_cut_under_rows_read_at_once_is_an_error_that_names_it(full, tmp_path):
    copy = shutil.copytree(full, tmp_path / "copy")
    shard = load_manifest(copy).shard(1)
    assert shard.num_bytes > 3 * 4096

    def work():
        stream = stream_of([warm(copy)])
        os.truncate(copy / shard.name, 4096)
        found = []
        with pytest.raises(DataError, match=rf"{shard.name}', block \d+, at byte \d+: .* instead of"):
            found.extend(stream.iterate(0, 500, range(4)))
        return "done"

    assert in_a_child(work) == "done"


def test_masked_rows_are_counted_once_and_stop_nobody_from_reading_at_once(full):
    manifest = load_manifest(full)
    listed = {manifest.fingerprint: [1, 4, 9]}
    told = ProgressListener(RowReader(full, quarantine=Quarantine.of(listed)))
    told.rows.read(range(manifest.rows))
    begin = told.rows.counters
    found = list(stream_of([told]).iterate(0, 300, range(4)))
    masked = sum(0 if b.mask is None else int((~b.mask.any(1)).sum()) for b in found)
    assert told.rows.counters.masked_rows - begin.masked_rows == masked > 0
    assert told.rows.counters.rows - begin.rows == 300 * BATCH
    assert max(map(len, told.reads())) > 1000


@pytest.mark.parametrize(("micro_batch", "taken", "largest"), [(MICRO_BATCH, 1500, 2049), (3000, 5, 3000)])
def test_what_is_held_is_bounded(full, micro_batch, taken, largest):
    told = ProgressListener(warm(full))
    batches = stream_of([told], batch=micro_batch, micro_batch=micro_batch).iterate(0, 10**6, range(1))
    for _ in range(taken):
        next(batches)
    batches.close()
    sizes = list(map(len, told.reads()))
    assert max(sizes) == largest
    assert sum(sizes) - taken * micro_batch <= 3 * micro_batch + largest


def test_long_rows_are_read_fewer_at_once(full, monkeypatch):
    monkeypatch.setattr("minilm.data.stream._TOKENS_AT_ONCE", 16 * 60)
    told = ProgressListener(warm(full))
    list(stream_of([told]).iterate(0, 100, range(4)))
    assert max(map(len, told.reads())) == 60


def test_items_come_in_order_and_then_the_error():
    def chunks():
        yield [1, 2, 3]
        yield [4]
        raise KeyError("five")

    found = []
    with pytest.raises(KeyError, match="five"):
        for item in read_ahead(chunks(), 2):
            found.append(item)
    assert found == [1, 2, 3, 4]
    assert list(read_ahead(iter([]), 1)) == [] and list(read_ahead(iter([[], [1], []]), 1)) == [1]


def test_a_chunk_is_begun_when_few_items_wait_and_closing_ends_the_thread():
    begun = []
    third = threading.Event()

    def chunks():
        for number in range(1000):
            begun.append(number)
            if number == 2:
                third.set()
            yield [number] * 10

    before = reading_ahead()
    items = read_ahead(chunks(), 25)
    next(items)
    assert third.wait(5)
    for count in range(2, 101):
        assert next(items) == (count - 1) // 10
        assert len(begun) * 10 <= count + 25 + 10
    assert len(reading_ahead() - before) == 1
    items.close()
    assert not reading_ahead() - before
