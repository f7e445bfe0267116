"""The order of rows: every row once, ranks that add up to one process, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cellfast.data import RowSampler
from cellfast.errors import CellfastError


def epoch(sampler: RowSampler, number: int = 0) -> list[np.ndarray]:
    return [sampler.batch(number, index) for index in range(len(sampler))]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(100, 10), (101, 10), (7, 10), (1, 1), (5, 1)])
def test_every_row_once_per_epoch(num_rows, batch_size, shuffle):
    batches = epoch(RowSampler(num_rows, batch_size, shuffle=shuffle))
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if not shuffle:
        assert np.concatenate(batches).tolist() == list(range(num_rows))


def test_the_last_minibatch_is_dropped_on_request():
    batches = epoch(RowSampler(101, 10, drop_last=True))
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(np.unique(np.concatenate(batches))) == 100


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("num_rows", "batch_size", "world_size"), [(100, 5, 4), (103, 5, 4), (42, 4, 3), (41, 20, 2)])
def test_ranks_together_see_what_one_process_sees(num_rows, batch_size, world_size, drop_last):
    one = RowSampler(num_rows, batch_size * world_size, seed=3, drop_last=drop_last)
    ranks = [
        RowSampler(num_rows, batch_size, seed=3, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(one)}
    for index in range(len(one)):
        pieces = [rank.batch(2, index) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(pieces), one.batch(2, index))
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_rows_in_the_last_minibatch_gives_empty_pieces_not_fewer_steps():
    ranks = [RowSampler(9, 2, rank=rank, world_size=4) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [2] * 4
    assert sorted(len(rank.batch(0, 1)) for rank in ranks) == [0, 0, 0, 1]


def test_seed_and_epoch_decide_the_order():
    def order(seed: int, number: int) -> list[int]:
        return np.concatenate(epoch(RowSampler(500, 50, seed=seed), number)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(0, 1) != order(1, 0)


def test_the_shuffle_is_over_all_rows():
    """Neighbours in the store (the cells of one well) fall into minibatches as independent draws would put them."""
    first = RowSampler(10_000, 100, seed=0).batch(0, 0)
    counts = np.histogram(first, bins=10, range=(0, 10_000))[0]
    assert counts.max() < 25  # ten expected; a block shuffle would put a hundred in one


def test_a_selection_of_rows_is_the_whole_world():
    chosen = np.array([5, 90, 17, 33])
    batches = epoch(RowSampler(100, 3, rows=chosen, shuffle=False))
    assert [batch.tolist() for batch in batches] == [[5, 90, 17], [33]]
    assert sorted(np.concatenate(epoch(RowSampler(100, 3, rows=chosen))).tolist()) == [5, 17, 33, 90]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 0), {}, "batch_size must be at least 1, got 0"),
        ((10, 2), {"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ((10, 2), {"seed": -1}, "seed must not be negative"),
        ((0, 2), {}, "no cells to load"),
        ((10, 2), {"rows": np.array([], dtype=np.int64)}, "no cells to load"),
        ((10, 20), {"drop_last": True}, "10 cells are fewer than 1 x 20. Use a batch size of at most 10"),
        ((3, 20), {"drop_last": True, "world_size": 4}, "keep the last one"),
        ((10, 2), {"rows": np.array([3, 10])}, r"rows must lie in 0..9, got 3..10"),
        ((10, 2), {"rows": np.array([3, 3])}, "must not repeat"),
        ((10, 2), {"rows": np.array([0.5])}, "integers"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, options, message):
    with pytest.raises(CellfastError, match=message):
        RowSampler(*arguments, **options)
