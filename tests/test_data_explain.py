"""Looking at data: steps explained, rows found, pages decoded."""

import pytest
import torch

from minilm.data.errors import DataError
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream
from minilm.data.tools.explain import explain, inspect, where
from tests.data_cases import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("look"))


def test_explain_tells_the_rows_of_a_step_and_where_finds_them_back(data):
    told = explain(data, step=31, batch=12, seed=5)
    stream = Stream(data, seed=5, batch=12, micro_batch=12)
    assert [row.row for row in told.rows] == stream.micro_batch(31, 0).row_ids.tolist()
    reader = RowReader(data)
    for row in told.rows:
        raw = (data / row.shard).read_bytes()[row.offset : row.offset + reader.manifest.layout.row_bytes]
        stored = torch.frombuffer(bytearray(raw), dtype=torch.uint16).to(torch.int64)
        assert torch.equal(stored, reader.read([row.row]).input_ids[0])
        found = where(data, row=row.row, batch=12, seed=5, epoch=row.epoch)
        assert (found.step, found.index, found.block) == (31, row.index, row.block)
        assert f"reads it in step 31, index {row.index} of the batch" in found.text()
    lines = told.text().splitlines()
    assert len(lines) == 13 and lines[0].split()[:4] == ["index", "corpus", "epoch", "row"]
    assert "[CLS]" in lines[1] and told.rows[0].words in lines[1]


def test_explain_knows_corpora_and_windows(data):
    corpora = [Corpus(RowReader(data), 3), Corpus(RowReader(data), 1)]
    told = explain(corpora, step=2, batch=16, seed=5, window=1)
    assert [row.corpus for row in told.rows].count(1) == 4
    assert told.as_dict()["rows"][0]["index"] == 0


def test_explain_names_a_step_that_does_not_exist(data):
    with pytest.raises(DataError, match="step -3 does not exist; steps count from 0"):
        explain(data, step=-3, batch=12, seed=5)


def test_inspect_decodes_a_page_and_counts_tokens(data):
    seen = inspect(data, page=1, rows_per_page=4)
    assert list(seen.rows) == [4, 5, 6, 7]
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for text in seen.rows.values())
    assert 0.9 < sum(inspect(data, num_tokens=500).frequent_tokens.values()) <= 1.0001
    assert seen.padding_fraction == 0 and seen.unknown_fraction == 0
    assert "most frequent tokens" in seen.text() and "  [CLS]" in seen.text()
    with pytest.raises(DataError, match=r"page 999 does not exist; there are pages 0 to \d+ of 10 rows"):
        inspect(data, page=999)


def test_inspect_counts_padding(tmp_path):
    seen = inspect(make_data(tmp_path, packing="document", documents=30))
    assert 0.02 < seen.padding_fraction < 0.9
    assert "[PAD]" not in seen.frequent_tokens
