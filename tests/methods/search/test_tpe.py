"""Optuna's Parzen estimators as they are set up here: better than chance, the same by seed, limits first."""

import numpy as np
import pytest
from problems import best, covered, late_violation, params, separable, trials_of, two_sided

from lilliput.errors import UserError
from lilliput.methods.search.random import Random
from lilliput.methods.search.tpe import Tpe

SEEDS = range(3)


def test_nearer_to_the_optimum_than_chance():
    ours = [best(Tpe(startup=10).build(seed), 60) for seed in SEEDS]
    random = [best(Random().build(seed), 60) for seed in SEEDS]
    assert np.median(ours) < 0.6 * np.median(random)


def test_a_better_front_of_two_objectives_than_chance():
    ours = [covered(Tpe(startup=10).build(seed, 2), 60) for seed in SEEDS]
    random = [covered(Random().build(seed, 2), 60) for seed in SEEDS]
    assert min(ours) > max(random)


def test_it_turns_away_from_settings_that_break_a_limit():
    assert np.mean([late_violation(Tpe(startup=10).build(seed), 60) for seed in SEEDS]) < 3


def test_a_seed_gives_the_same_trials_and_another_gives_others():
    one, again, other = (params(trials_of(Tpe(startup=5).build(seed), separable, 20)) for seed in (3, 3, 4))
    assert one == again
    assert one != other


def test_settings_reach_the_sampler():
    """Only random trials before `startup` are over, knobs apart with several objectives."""
    early = params(trials_of(Tpe(startup=20).build(3), separable, 20))
    assert early == params(trials_of(Tpe(startup=20, candidates=1).build(3), separable, 20))
    late = params(trials_of(Tpe(startup=5).build(3), separable, 20))
    assert early[:5] == late[:5]
    assert early != late
    assert late != params(trials_of(Tpe(startup=5, candidates=1).build(3), separable, 20))
    assert Tpe().build(0, 1)._multivariate
    assert not Tpe().build(0, 2)._multivariate
    trials_of(Tpe(startup=5).build(0, 2), two_sided, 20, ("minimize", "maximize"))


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="startup is 0"):
        Tpe(startup=0)
