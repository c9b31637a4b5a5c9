"""Intervals against scipy, closed forms and simulated truth."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lilliput.errors import UserError
from lilliput.metrics.intervals import (
    area_change,
    contrast_interval,
    drawn_interval,
    each_of,
    mean_interval,
    paired_share,
    ranking_area,
    rate_at,
    share_interval,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 9, 200, 5000, 200_000])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9999])
def test_student_quantiles_are_scipys(degrees, probability):
    assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=2e-3)


@pytest.mark.parametrize(("count", "total"), [(0, 3), (3, 3), (7, 50), (1, 1000)])
def test_shares_have_the_interval_of_wilson(count, total):
    theirs = stats.binomtest(count, total).proportion_ci(0.9, method="wilson")
    assert tuple(share_interval(count, total, 0.9)) == pytest.approx((count / total, theirs.low, theirs.high))


def test_means_have_students_interval():
    values = torch.tensor([0.1, -0.4, 0.9, 0.3])
    theirs = stats.t.interval(0.95, 3, values.mean().item(), stats.sem(values.numpy()))
    assert mean_interval(values)[1:] == pytest.approx(theirs, rel=1e-3)
    assert mean_interval(torch.tensor([2.0])) == (2.0, -math.inf, math.inf)


def test_paired_shares_are_bonett_and_prices():
    d = torch.tensor([1.0] * 2 + [-1.0] * 5 + [0.0] * 13)
    gained, lost, n = 3 / 22, 6 / 22, 22
    half = stats.norm.ppf(0.975) * math.sqrt((gained + lost - (gained - lost) ** 2) / n)
    assert paired_share(d) == pytest.approx((-3 / 20, gained - lost - half, gained - lost + half))
    few = paired_share(torch.zeros(3))
    assert few.low < -0.3 < 0.3 < few.high  # three samples without a difference are no proof


@pytest.mark.parametrize("lost", [0.0, 0.02, 0.3])
def test_many_paired_intervals_hold_at_once(lost):
    rng, groups, missed = np.random.default_rng(0), 10, 0
    for _ in range(300):
        level = each_of(0.95, groups)
        draws = rng.choice([-1.0, 0.0, 1.0], p=[lost, 0.98 - lost, 0.02], size=(groups, 40))
        found = [paired_share(torch.from_numpy(d), level) for d in draws]
        missed += any(not i.low <= 0.02 - lost <= i.high for i in found)
    assert missed <= 0.09 * 300
    assert each_of(0.95, 0) == 0.95


def test_contrasts_hold_the_true_difference():
    rng, missed = np.random.default_rng(1), 0
    for _ in range(400):
        inside, outside = (torch.from_numpy(rng.choice([-1.0, 0.0], p=[p, 1 - p], size=60)) for p in (0.3, 0.1))
        found = contrast_interval(inside, outside)
        missed += not found.low <= -0.2 <= found.high
    assert missed <= 0.08 * 400


def test_areas_are_mann_and_whitneys_and_delongs_interval_covers():
    rng = np.random.default_rng(2)
    members, others = rng.normal(0.5, 1, 50).round(1), rng.normal(0, 1, 70).round(1)
    found = ranking_area(torch.from_numpy(members), torch.from_numpy(others))
    assert found.value == pytest.approx(stats.mannwhitneyu(members, others).statistic / (50 * 70))
    true, missed = stats.norm.cdf(0.5 / math.sqrt(2)), 0
    for _ in range(300):
        pair = (torch.from_numpy(rng.normal(mean, 1, 60)) for mean in (0.5, 0))
        found = ranking_area(*pair)
        missed += not found.low <= true <= found.high
    assert 2 <= missed <= 0.1 * 300


def test_the_change_of_an_area_is_paired():
    rng = np.random.default_rng(3)
    members, others = (torch.from_numpy(rng.normal(mean, 1, 200)) for mean in (0.5, 0))
    same = area_change((members, others), (members, others))
    assert same == (0, 0, 0)
    worse = area_change((members, others), (members + 1, others))
    before, after = ranking_area(members, others), ranking_area(members + 1, others)
    assert worse.value == pytest.approx(after.value - before.value)
    assert 0 < worse.low < worse.value < worse.high
    assert worse.high - worse.low < after.high - before.low  # the pairs share their chance


def test_rates_at_a_false_rate():
    others, members = torch.arange(100.0), torch.tensor([98.5, 99.5, 97.0, 50.0])
    assert rate_at(members, others, 0.01) == 0.5  # the threshold is 98: one other of a hundred lies above
    assert rate_at(members, others, 0.0) == 0.25
    assert rate_at(others, others, 0.01) == 0.01


def test_drawn_intervals_agree_with_scipys_bootstrap():
    values = torch.from_numpy(np.random.default_rng(4).normal(1, 2, 80))
    ours = drawn_interval(lambda picks, _: float(values[picks].mean()), (80, 1), draws=4000)
    theirs = stats.bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=1)
    assert ours.value == pytest.approx(float(values.mean()))
    assert ours[1:] == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_wrong_input_is_named():
    with pytest.raises(UserError, match=r"level of an interval is 1\.5"):
        paired_share(torch.zeros(4), 1.5)
    with pytest.raises(UserError, match="0 of 0"):
        share_interval(0, 0)
    for values in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(UserError, match="1 or more values"):
            paired_share(values)
    with pytest.raises(UserError, match="2 or more values"):
        ranking_area(torch.zeros(1), torch.zeros(5))
