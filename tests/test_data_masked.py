"""Packing "masked": several documents in a row, and each handed out as if it were alone."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import webdataset

from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.format.pack import _OPEN_ROWS, fill, masked_rows, pieces
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Batch, Corpus
from minilm.data.stream import Stream
from minilm.data.tools.convert import convert
from minilm.data.torch_dataset import StreamDataset
from minilm.orchestrator.feed.ledger import rows_digest
from tests.data_cases import CLS, PAD, SEP, make_data


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("masked"), packing="masked")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The same pieces, a row each."""
    return make_data(tmp_path_factory.mktemp("documents"), packing="document")


def whole(folder):
    reader = RowReader(folder)
    return reader.read(range(reader.num_rows))


def texts(batch):
    ids, mask = batch.sequences
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return [tuple(row[own].tolist()) for row, own in zip(ids, valid, strict=True)]


def test_rows_are_filled_with_whole_pieces_and_nothing_is_lost():
    tokens = np.arange(10, 26, dtype=np.uint16)
    rows, ends = masked_rows(tokens, np.array([3, 2, 8, 1, 2]), np.array([2, 1, 2]), 10, CLS, SEP, PAD)
    assert rows.tolist() == [
        [CLS, 10, 11, 12, SEP, CLS, 13, 14, SEP, PAD],
        [CLS, *range(15, 23), SEP],
        [CLS, 23, SEP, CLS, 24, 25, SEP, PAD, PAD, PAD],
    ]
    assert [row.nonzero()[0].tolist() for row in ends] == [[4, 8], [9], [2, 6]]
    assert rows.dtype == np.uint16


@pytest.mark.parametrize("seq_len", [8, 64, 513])
def test_every_piece_has_one_place_where_it_fits(seq_len):
    lengths = pieces(np.random.default_rng(seq_len).geometric(0.03, 3000), seq_len)
    order, counts = fill(lengths, seq_len)
    assert sorted(order.tolist()) == list(range(len(lengths))) and counts.min() >= 1
    held = np.add.reduceat(lengths[order] + 2, np.cumsum(counts) - counts)
    assert held.max() <= seq_len
    if seq_len == 513:
        assert held.sum() > 0.97 * seq_len * (len(counts) - _OPEN_ROWS)
    assert fill(lengths[:0], seq_len)[1].tolist() == []


def test_a_build_holds_the_pieces_of_document_packing_in_fewer_rows(masked, documents):
    one, other = whole(masked), whole(documents)
    assert sorted(texts(one)) == sorted(texts(other))
    assert len(one.row_ids) < len(other.row_ids)
    assert int(one.mask.sum()) == load_manifest(masked).tokens == load_manifest(documents).tokens
    assert (one.input_ids[~one.mask] == PAD).all()
    assert (one.input_ids[one.ends] == SEP).all()
    several = int(one.ends.sum(1).argmax())  # a row, and the first document in it
    first = one.sequences[0][int(one.ends[:several].sum())]
    assert first[0] == CLS and first.tolist()[: 1 + int(one.ends[several].nonzero()[0])].count(SEP) == 1
    assert [text[0] for text in texts(one.first_documents)] == [CLS] * len(one.row_ids)
    assert texts(one.first_documents) == [
        tuple(row[: int(ends.nonzero()[0]) + 1].tolist())
        for row, ends in zip(one.input_ids, one.ends, strict=True)
    ]
    assert one.row_of(int(one.ends[:several].sum())) == several


def test_plain_webdataset_reads_the_ends(masked):
    samples = webdataset.WebDataset(str(masked / "shard-000000.tar"), shardshuffle=False).decode()
    sample = next(iter(samples))
    ends = np.unpackbits(sample["ends.npy"], axis=1, count=16, bitorder="little")
    assert np.array_equal(ends, whole(masked).ends[: len(ends)].numpy())


def test_a_flipped_end_is_damage_and_a_block_in_quarantine_holds_no_document(masked, tmp_path):
    folder = shutil.copytree(masked, tmp_path / "copy")
    manifest = load_manifest(folder)
    path = folder / manifest.shard(0).name
    raw = bytearray(path.read_bytes())
    raw[manifest.layout.lengths_at(0, manifest.rows_per_block)] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="block 0, at byte 0: its .* bytes do not have the checksum"):
        whole(folder)
    quarantine = Quarantine(tmp_path / "list.json", max_quarantined_share=1.0)
    with pytest.raises(Exception, match="grew|quarantine"):
        RowReader(folder, quarantine=quarantine).read([0])
    quarantine = Quarantine(tmp_path / "list.json", max_quarantined_share=1.0)
    reader = RowReader(folder, quarantine=quarantine)
    rows = range(manifest.rows_per_block + 3)
    batch, sound = reader.read(rows), RowReader(masked).read(rows)
    assert not batch.ends[: manifest.rows_per_block].any() and not batch.mask[: manifest.rows_per_block].any()
    assert torch.equal(batch.ends[-3:], sound.ends[-3:])
    assert texts(batch) == texts(sound)[-int(batch.ends.sum()) :]
    assert texts(reader.read([0, 1])) == [()]  # nothing to compute


def test_a_mixture_with_rows_of_another_packing(masked, documents, tmp_path):
    full = make_data(tmp_path, documents=40, seed=4)
    stream = Stream(
        [Corpus(RowReader(folder), 1.0) for folder in (masked, documents, full)],
        seed=3,
        batch=30,
        micro_batch=30,
    )
    batch = stream.micro_batch(0, 0)
    corpora = [address.corpus for address in stream.addresses(0, 0)]
    found = texts(batch)
    for row, corpus in enumerate(corpora):
        mine = [found.pop(0) for _ in range(int(batch.ends[row].sum()))]
        assert corpus == 0 or len(mine) == 1
        assert sum(mine, ()) == tuple(batch.input_ids[row][batch.mask[row]].tolist())
    assert not found


def test_other_programs_get_the_borders_too(masked, tmp_path):
    element = next(iter(StreamDataset(masked, seed=3, batch=12, micro_batch=12, num_steps=1)))
    ids, numbers = element["input_ids"], element["document_ids"]
    assert torch.equal(numbers > 0, element["attention_mask"])
    for row, own in zip(ids, numbers, strict=True):
        for number in range(1, int(own.max()) + 1):
            document = row[own == number].tolist()
            assert document[0] == CLS and document[-1] == SEP and document.count(SEP) == 1
    convert(masked, tmp_path / "rows")
    records = webdataset.WebDataset(str(tmp_path / "rows" / "shard-000000.tar"), shardshuffle=False).decode()
    batch = whole(masked)
    for row, record in enumerate(records):
        borders = [0, *record["ends.npy"].tolist()]
        assert borders[-1] == len(record["tokens.npy"]) == int(batch.mask[row].sum())
        assert borders[1:] == (batch.ends[row].nonzero()[:, 0] + 1).tolist()


def test_the_ledger_tells_rows_apart_by_their_borders(masked):
    batch = whole(masked)
    several = int(batch.ends.sum(1).argmax())
    fewer = batch.ends.clone()
    fewer[several, int(batch.ends[several].nonzero()[0])] = False
    assert rows_digest(batch) != rows_digest(batch._replace(ends=fewer))
    assert rows_digest(batch) == rows_digest(Batch(*(tensor.clone() for tensor in batch)))
