"""Optuna's NSGA-II as it is set up here: fronts better than chance, the same by seed, limits first."""

import numpy as np
import pytest
from problems import best, covered, late_violation, params, separable, trials_of

from lilliput.errors import UserError
from lilliput.methods.search.nsga2 import Nsga2
from lilliput.methods.search.random import Random

SEEDS = range(5)


def test_nearer_to_the_optimum_than_chance():
    ours = [best(Nsga2(population=20).build(seed), 300) for seed in SEEDS]
    random = [best(Random().build(seed), 300) for seed in SEEDS]
    assert np.median(ours) < 0.6 * np.median(random)


def test_a_better_front_of_two_objectives_than_chance():
    ours = [covered(Nsga2(population=20).build(seed, 2), 300) for seed in SEEDS]
    random = [covered(Random().build(seed, 2), 300) for seed in SEEDS]
    assert min(ours) > max(random)


def test_generations_turn_away_from_settings_that_break_a_limit():
    assert np.mean([late_violation(Nsga2(population=20).build(seed), 150) for seed in SEEDS]) < 3


def test_a_seed_gives_the_same_trials_and_another_gives_others():
    one, again, other = (params(trials_of(Nsga2(population=10).build(s), separable, 40)) for s in (3, 3, 4))
    assert one == again
    assert one != other


def test_the_first_generation_is_random_and_its_children_are_not():
    ours = params(trials_of(Nsga2(population=10).build(3), separable, 40))
    wider = params(trials_of(Nsga2(population=20).build(3), separable, 40))
    assert ours[:10] == wider[:10]
    assert ours[10:20] != wider[10:20]
    parents = set(ours[:10])
    values = [{p[i] for p in parents} for i in range(6)]
    inherited = np.mean([child[i] in values[i] for child in ours[10:20] for i in range(6)])
    assert inherited > 0.8  # one value in six mutates


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="population is 1"):
        Nsga2(population=1)
