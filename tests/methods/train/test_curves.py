import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from lilliput.errors import UserError
from lilliput.methods.train._curves import (
    CURVES,
    Sigmoid,
    breakeven_queries,
    fewest_tries,
    fit_lines,
    fit_saturating,
    fit_sigmoid,
    pass_at_k,
    rising,
    training_operations,
)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k):
    rows = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in rows]
    torch.testing.assert_close(pass_at_k(torch.tensor(rows), k), torch.tensor(expected))


def test_pass_at_k_of_more_tries_than_samples_is_refused():
    for k in (0, 4):
        with pytest.raises(UserError, match=f"pass@{k}"):
            pass_at_k(torch.ones(2, 3), k)


def test_points_below_an_earlier_one_are_left_out():
    assert rising([0.1, 0.3, 0.2, 0.3, 0.29, 0.5]) == [0, 1, 3, 5]
    assert rising([0.5, 0.4, 0.3]) == [0]
    assert rising([]) == []


# --- over training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "c"), [(0.6, 5.0, 0.1), (0.3, 1.0, 0.0), (0.9, 50.0, -0.2)])
@pytest.mark.parametrize("unit", [1.0, 1e12])
def test_a_saturating_curve_is_found_again_in_any_unit(a, b, c, unit):
    x = np.linspace(0.05, 0.6, 8)
    curve = fit_saturating(list(x * unit), list(a * (1 - np.exp(-b * x)) + c))
    for at in (0.05, 0.3, 0.6, 1.0):
        assert curve(at * unit) == pytest.approx(a * (1 - math.exp(-b * at)) + c, abs=0.01)


def test_its_error_is_that_of_another_solver():
    rng = np.random.default_rng(0)
    x = np.linspace(0.1, 1.0, 12)
    y = 0.7 * (1 - np.exp(-3 * x)) + 0.05 + 0.03 * rng.normal(size=12)
    curve = fit_saturating(list(x), list(y))
    best, _ = curve_fit(lambda x, a, b, c: a * (1 - np.exp(-b * x)) + c, x, y, p0=(1, 1, 0), maxfev=10_000)
    error = sum((curve(at) - value) ** 2 for at, value in zip(x, y))
    least = float(((best[0] * (1 - np.exp(-best[1] * x)) + best[2] - y) ** 2).sum())
    assert error <= least * 1.01


def test_a_fall_becomes_the_mean_and_a_constant_stays():
    assert fit_saturating([0.1, 0.2, 0.3], [0.9, 0.6, 0.3])(5.0) == pytest.approx(0.6)
    assert fit_saturating([0.1, 0.2, 0.3], [0.4, 0.4, 0.4])(1.0) == pytest.approx(0.4)
    assert fit_saturating([0.0, 0.0, 0.0], [0.1, 0.2, 0.3])(1.0) == pytest.approx(0.2)


def test_two_points_are_too_few():
    with pytest.raises(UserError, match="at least 3"):
        fit_saturating([0.1, 0.2], [0.1, 0.2])
    with pytest.raises(UserError, match="3 and 2"):
        fit_saturating([0.1, 0.2, 0.3], [0.1, 0.2])


# --- over tries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [Sigmoid(1.0, 0.8, -1.0), Sigmoid(0.7, 1.5, -2.0), Sigmoid(0.9, 0.0, 0.3)])
def test_a_sigmoid_is_found_again(true):
    tries = [1, 2, 4, 8, 16]
    curve = fit_sigmoid(tries, [true(k) for k in tries])
    for k in (1, 3, 16):
        assert curve(k) == pytest.approx(true(k), abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_curves_rise_and_stay_accuracies(accuracies):
    tries = [2**i for i in range(len(accuracies))]
    for fit in CURVES.values():
        values = [fit(tries, accuracies)(k) for k in range(1, 20)]
        assert all(0 <= v <= 1 for v in values)
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_lines_go_through_rising_points_and_are_flat_outside():
    curve = fit_lines([4, 1, 2], [0.5, 0.2, 0.6])  # in any order; 0.5 after 0.6 is lifted
    assert [curve(k) for k in (1, 2, 4, 100)] == pytest.approx([0.2, 0.6, 0.6, 0.6])
    assert curve(math.sqrt(2)) == pytest.approx(0.4)


def test_the_fewest_tries_are_the_first_that_reach_the_target():
    curve = Sigmoid(1.0, 1.0, 0.0)  # K / (K + 1)
    assert fewest_tries(curve, 0.5, 10) == 1
    assert fewest_tries(curve, 0.75, 10) == 3
    assert fewest_tries(curve, 0.76, 10) == 4
    assert fewest_tries(curve, 0.95, 10) is None


def test_one_number_of_tries_is_no_curve():
    for fit in CURVES.values():
        with pytest.raises(UserError, match="at least two"):
            fit([1], [0.5])
        with pytest.raises(UserError, match="from 1"):
            fit([0, 1], [0.5, 0.5])


# --- cost ------------------------------------------------------------------------------------------------------


def test_break_even_by_hand():
    assert training_operations(10, 100) == 6000
    # saved 6 * 10 * 50 = 3000; three further tries of 5 tokens cost 3 * 2 * 10 * 5 = 300 a query
    assert breakeven_queries(10, 50, 5, 4) == pytest.approx(10)
    assert breakeven_queries(10, 50, 5, 4, verifier_operations=75) == pytest.approx(5)
    assert breakeven_queries(10, 50, 5, 1, verifier_operations=75) == math.inf
    assert breakeven_queries(10, 0, 5, 4) == 0
