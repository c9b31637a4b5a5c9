"""Ranks from a share of the weights, and where the staircase puts them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.factorize._ranks import (
    break_even_rank,
    last_before_step,
    snap_to_multiple,
    snap_to_staircase,
    svd_rank,
    tucker_ranks,
)

sizes = st.integers(2, 300)


@given(sizes, sizes, st.floats(0.02, 1))
def test_svd_rank_is_the_largest_within_the_share(n, k, ratio):
    rank = svd_rank(n, k, ratio)
    assert 1 <= rank <= min(n, k)
    assert rank == 1 or rank * (n + k) <= ratio * n * k + 1e-6 * n * k
    assert (rank + 1) * (n + k) > ratio * n * k


@given(sizes, sizes, st.sampled_from([9, 25, 3]), st.floats(0.02, 1))
def test_tucker_ranks_keep_at_most_the_share(out, inp, window, ratio):
    r_out, r_in = tucker_ranks(out, inp, window, ratio)
    assert 1 <= r_out <= out
    assert 1 <= r_in <= inp
    if min(r_out, r_in) > 1:
        assert r_in * inp + r_in * r_out * window + r_out * out <= ratio * out * inp * window * (1 + 1e-9)


def test_break_even():
    assert break_even_rank(64, 64) == 32
    assert svd_rank(64, 64, 1.0) == 32
    assert svd_rank(1000, 2, 1.0) == 1


@pytest.mark.parametrize(
    ("rank", "multiple", "full", "expected"),
    [
        (30, 16, 96, 32),
        (23, 16, 96, 16),
        (24, 16, 96, 32),
        (5, 16, 96, 5),
        (9, 16, 10, 9),
        (95, 16, 100, 96),
        (40, 1, 96, 40),
    ],
)
def test_snap_to_multiple(rank, multiple, full, expected):
    assert snap_to_multiple(rank, multiple, full) == expected


def staircase(rank):
    """Steps of 16, with a double step after 32."""
    return math.ceil(rank / 16) + (2 if rank > 32 else 0) + 1e-4 * rank


def test_snap_finds_the_rank_below_the_highest_step():
    assert last_before_step([8, 16, 24, 32, 40], [staircase(r) for r in (8, 16, 24, 32, 40)]) == 32
    for start in (20, 30, 37, 44):
        assert snap_to_staircase(start, 96, staircase) == 32
    assert snap_to_staircase(60, 96, staircase, window=10) == 64


def test_snap_stays_inside_the_layer_and_takes_another_criterion():
    assert snap_to_staircase(3, 3, staircase) == 3
    seen = []
    assert snap_to_staircase(10, 20, lambda r: seen.append(r) or r, choose=lambda ranks, times: ranks[0]) == 4
    assert seen == [4, 8, 12, 16, 20]


def test_a_staircase_of_one_rank_is_refused():
    with pytest.raises(UserError, match="two or more ranks"):
        last_before_step([4], [1.0])
