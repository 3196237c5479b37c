"""The windowed order: exact epochs, few shards at a time, frozen, and invertible, whatever the short last shard."""

import numpy as np
import pytest

from minilm.data.errors import DataError
from minilm.data.order.windowed import make_windowed_order

SHAPES = [
    (1, 1, 1),
    (10, 3, 1),
    (10, 3, 2),
    (12, 3, 2),
    (100, 7, 4),
    (101, 10, 3),
    (64, 64, 5),
    (997, 10, 13),
]

# (rows, seed, shard rows, window, first position): the next eight rows. Never change these.
GOLDEN = {
    (10, 0, 3, 1, 0): [5, 4, 3, 1, 2, 0, 9, 7],
    (10, 0, 3, 2, 7): [8, 9, 7, 7, 8, 2, 1, 6],
    (1000, 1, 64, 4, 990): [867, 49, 847, 851, 893, 836, 980, 973],
    (123457, 42, 1000, 16, 400000): [25895, 122772, 109316, 63767, 17736, 75620, 89384, 52343],
    (10000000000, 18446744073709551615, 131072, 64, 49999999996): [
        3962900710,
        7061215197,
        2885827541,
        2885893733,
        1581921203,
        1761747473,
        1627658032,
        7743456658,
    ],
}


def test_golden_vectors():
    for (num_rows, seed, shard_rows, window, first), rows in GOLDEN.items():
        assert make_windowed_order(num_rows, seed, shard_rows, window).rows(first, 8).tolist() == rows


@pytest.mark.parametrize(("num_rows", "shard_rows", "window"), SHAPES)
def test_every_row_exactly_once_an_epoch(num_rows, shard_rows, window):
    for seed in range(5):
        order = make_windowed_order(num_rows, seed, shard_rows, window)
        for epoch in (0, 1, 10**6):
            rows = order.rows(epoch * num_rows, num_rows)
            assert np.array_equal(np.sort(rows), np.arange(num_rows))


@pytest.mark.parametrize(("num_rows", "shard_rows", "window"), SHAPES)
def test_position_is_the_inverse_and_slices_do_not_depend_on_the_cut(num_rows, shard_rows, window):
    order = make_windowed_order(num_rows, 11, shard_rows, window)
    whole = order.rows(2 * num_rows - num_rows // 2, num_rows + 5)
    parts = [order.rows(2 * num_rows - num_rows // 2 + i, 1) for i in range(num_rows + 5)]
    assert np.array_equal(np.concatenate(parts), whole)
    mixed = np.random.default_rng(0).permutation(len(whole))
    assert np.array_equal(order.at(2 * num_rows - num_rows // 2 + mixed), whole[mixed])
    for row in range(0, num_rows, 1 + num_rows // 50):
        position = order.position(row, 3)
        assert position // num_rows == 3 and order.rows(position, 1)[0] == row


@pytest.mark.parametrize(("num_rows", "shard_rows", "window"), SHAPES)
def test_a_window_touches_its_shards_only(num_rows, shard_rows, window):
    order = make_windowed_order(num_rows, 4, shard_rows, window)
    found = {}
    for position, row in enumerate(order.rows(num_rows, num_rows), start=num_rows):
        epoch, number = order.window_of(position)
        assert epoch == 1
        found.setdefault(number, set()).add(int(row) // shard_rows)
    assert list(found) == list(range(order.num_windows))
    for number, shards in found.items():
        assert shards == set(order.shards_of(1, number).tolist()) and len(shards) <= window


def test_rows_of_a_window_are_shuffled_across_its_shards():
    order = make_windowed_order(10_000, 1, 100, 10)
    rows = order.rows(0, 1000)
    assert len(set((rows[:100] // 100).tolist())) == 10
    assert (np.diff(rows) == 1).sum() < 10


def test_ten_billion_rows_cost_no_more():
    order = make_windowed_order(10**10, 3, 131_072, 64)
    rows = order.rows(399_999 * 1024, 1024)
    assert len(np.unique(rows)) == 1024 and len(np.unique(rows // 131_072)) <= 128


def test_an_empty_window_is_refused():
    with pytest.raises(DataError, match="a window of 0 shards holds nothing; give at least 1"):
        make_windowed_order(10, 1, 3, 0)
