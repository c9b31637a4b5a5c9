"""Differences between contenders, by window and by seed, against numbers worked out by hand."""

import pytest
import torch

from lilliput.papers._binary_nets import Trained
from lilliput.papers._equal_seconds import Found
from lilliput.papers._paired import advantage, advantage_by_seed, mean_and_spread, points_over


def test_an_advantage_is_paired_by_window():
    ours, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
    assert advantage(ours, other) == pytest.approx((2.0, 1 / 3**0.5))
    assert advantage(other, ours)[0] == pytest.approx(-2.0)


def test_an_advantage_is_paired_by_seed():
    assert advantage_by_seed([90.0, 80.0, 70.0], [89.0, 78.0, 67.0]) == pytest.approx((2.0, 1 / 3**0.5))
    assert advantage_by_seed([1.5, 2.5], [1.0, 2.0]) == pytest.approx((0.5, 0.0))
    assert advantage_by_seed([1.0], [0.0]) == (1.0, float("inf"))
    with pytest.raises(ValueError, match="shorter"):
        advantage_by_seed([1.0, 2.0], [1.0])


def test_points_are_those_of_any_contender_with_accuracies():
    ours = Found(1.0, [80.0, 85.0, 90.0])
    other = Trained([79.0, 83.0, 89.0], torch.nn.Identity())
    assert points_over(ours, other) == pytest.approx((4 / 3, 1 / 3))


def test_the_spread_is_over_seeds_or_of_a_single_one_over_samples():
    one, other = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])
    assert mean_and_spread([one, other]) == pytest.approx((2.5, 0.5**0.5))
    assert mean_and_spread([one]) == pytest.approx((2.0, 1.0))
