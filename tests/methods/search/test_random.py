"""Uniform over every knob, the same by seed, and learning nothing."""

import numpy as np
import pytest
from problems import KNOBS, late_violation, params, separable, tempting, trials_of, two_sided

from lilliput.methods.search.random import Random


def test_every_value_of_a_knob_is_equally_likely():
    drawn = np.array(params(trials_of(Random().build(0), separable, 1000)))
    for knob in range(len(KNOBS)):
        counts = np.bincount(drawn[:, knob], minlength=10)
        chi_square = float(np.square(counts - 100).sum() / 100)
        assert chi_square < 27.9  # exceeded once in a thousand by 9 degrees of freedom
    assert abs(np.corrcoef(drawn.T) - np.eye(len(KNOBS))).max() < 0.12


def test_a_seed_gives_the_same_trials_and_another_gives_others():
    one, again, other = (params(trials_of(Random().build(seed), separable, 20)) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert params(trials_of(Random().build(None), separable, 20)) != one


def test_results_limits_and_further_objectives_change_nothing():
    plain = params(trials_of(Random().build(5), separable, 30))
    assert params(trials_of(Random().build(5), tempting, 30)) == plain
    assert params(trials_of(Random().build(5, 2), two_sided, 30, ("minimize", "minimize"))) == plain
    assert late_violation(Random().build(0), 600) == pytest.approx(9.2, abs=1.5)  # E max(0, S - 18), S about N(27, 49)
