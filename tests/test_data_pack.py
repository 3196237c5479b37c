"""Documents -> rows: nothing lost, nothing mixed that must not be."""

import numpy as np
import pytest

from minilm.data.errors import DataError
from minilm.data.format.pack import document_rows, dtype_for, full_rows, joined, pieces

CLS, SEP, PAD = 101, 102, 0


def test_full_rows_are_the_joined_documents_between_cls_and_sep():
    documents = [np.arange(10, 13), np.arange(20, 21), np.arange(30, 36)]
    tokens = np.concatenate(documents).astype(np.uint16)
    stream = joined(tokens, np.array([3, 1, 6]), SEP)
    assert stream.tolist() == [10, 11, 12, SEP, 20, SEP, 30, 31, 32, 33, 34, 35, SEP]
    rows = full_rows(stream[:12], 6, CLS, SEP)
    assert rows.tolist() == [
        [CLS, 10, 11, 12, SEP, SEP],
        [CLS, 20, SEP, 30, 31, SEP],
        [CLS, 32, 33, 34, 35, SEP],
    ]
    assert rows.dtype == np.uint16


def test_document_rows_hold_one_document_each_and_lose_nothing():
    lengths = np.array([3, 1, 4, 9])
    tokens = np.arange(1, 18, dtype=np.uint32)
    piece_lengths = pieces(lengths, 6)
    assert piece_lengths.tolist() == [3, 1, 4, 4, 4, 1]
    rows, row_lengths = document_rows(tokens, piece_lengths, 6, CLS, SEP, PAD)
    assert row_lengths.tolist() == [5, 3, 6, 6, 6, 3]
    assert rows[0].tolist() == [CLS, 1, 2, 3, SEP, PAD]
    assert rows[5].tolist() == [CLS, 17, SEP, PAD, PAD, PAD]
    content = [row[1 : n - 1] for row, n in zip(rows, row_lengths, strict=True)]
    assert np.concatenate(content).tolist() == tokens.tolist()


def test_ids_take_two_bytes_where_they_fit():
    assert [dtype_for(size) for size in (30522, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_a_row_without_room_is_refused():
    with pytest.raises(DataError, match="seq_len 2 leaves no room for text; give at least 3"):
        pieces(np.array([1]), 2)
