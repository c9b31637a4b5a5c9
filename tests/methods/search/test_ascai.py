"""ASCAI's proposals and score, and its search against random sampling."""

import math

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from lilliput.fitting.study import open_study, run_trials
from lilliput.methods.search._genome import Genome, Records, generator
from lilliput.methods.search.ascai import Ascai, floor_score, mix, perturb, scalarise, swap

LAYERS = 16


def compress(trial):
    """Gain under an accuracy floor: early layers are delicate, late ones are where the weights are."""
    x = np.array([trial.suggest_float(f"layer{i}", 0, 1) for i in range(LAYERS)])
    gain = float((x * np.arange(1, LAYERS + 1)).sum() / np.arange(1, LAYERS + 1).sum())
    accuracy = 0.9 - float((x**3 * np.linspace(1, 0.1, LAYERS)).mean())
    return -floor_score(gain, accuracy, floor=0.85, temperature=0.005)


def test_score_is_the_gain_above_the_floor_and_falls_steeply_below():
    assert floor_score(0.4, 0.91, 0.9, 0.01) == 0.4
    assert floor_score(0.4, 0.90, 0.9, 0.01) == 0.4
    assert floor_score(0.4, 0.88, 0.9, 0.01) == pytest.approx(0.4 * math.exp(-2))


def test_mixing_stays_between_the_two_and_never_averages_names():
    genome = Genome.of(
        {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1), "c": CategoricalDistribution("abc")}
    )
    a, b, rng = np.array([0.2, 0.9, 1 / 6]), np.array([0.6, 0.1, 5 / 6]), generator(0, 0)
    for _ in range(50):
        m = mix(a, b, genome, rng)
        assert 0.2 <= m[0] <= 0.6
        assert m[0] - 0.2 == pytest.approx((0.9 - m[1]) / 2)  # one weight for all
        assert m[2] in (1 / 6, 5 / 6)


def test_swapping_takes_each_coordinate_from_one_of_the_two():
    rng = generator(0, 0)
    shares = [swap(np.zeros(40), np.ones(40), rng).mean() for _ in range(300)]
    assert set(np.unique(swap(np.zeros(40), np.ones(40), rng))) <= {0.0, 1.0}
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert min(shares) < 0.1 < 0.9 < max(shares)


def test_noise_shrinks_but_always_reaches_the_next_cell():
    genome, rng = Genome.of({f"n{i}": IntDistribution(0, 4) for i in range(20)}), generator(0, 0)
    start = genome.encode(dict.fromkeys(genome.space, 2))
    hops = {
        spread: [np.abs(genome.snap(perturb(start, genome, spread, rng)) - start).max() for _ in range(200)]
        for spread in (0.0, 0.5)
    }
    assert 0.5 < np.mean(np.array(hops[0.0]) > 0) <= 1
    assert np.mean(hops[0.0]) < np.mean(hops[0.5])


def test_one_loss_for_several_objectives():
    losses = np.array([[0.0, 10.0], [1.0, 0.0], [0.5, 0.0], [0.0, np.inf], [0.0, 0.0]])
    scalar = scalarise(Records(np.zeros((5, 1)), losses[:3], np.zeros(3)))
    assert scalar.tolist() == [0.5, 0.5, 0.25]
    limited = scalarise(Records(np.zeros((5, 1)), losses, np.array([0, 0, 0.5, 0, 2.0])))
    assert np.argsort(limited, kind="stable")[-2:].tolist() == [2, 4]
    assert np.isfinite(limited).all()
    assert scalarise(Records(np.zeros((2, 1)), np.ones((2, 1)), np.zeros(2))).tolist() == [0, 0]


def test_better_than_random_on_compression_with_a_floor():
    def best(sampler):
        study = open_study(None, "s", sampler)
        run_trials(study, compress, trials=160)
        return -study.best_value

    ours = np.median([best(Ascai().build(seed)) for seed in range(5)])
    random = np.median([best(RandomSampler(seed=seed)) for seed in range(5)])
    assert ours > random + 0.05


def test_limits_are_met_first():
    def limited(trial):
        x = sum(trial.suggest_int(f"n{i}", 0, 8) for i in range(20))
        trial.set_user_attr("violation", max(0, x - 40))
        return -float(x)

    study = open_study(None, "s", Ascai().build(0))
    run_trials(study, limited, trials=200)
    met = [-t.values[0] for t in study.get_trials() if t.user_attrs["violation"] == 0]
    assert met  # one random trial in some thousands meets it
    assert max(met) >= 36
    assert np.median([t.user_attrs["violation"] for t in study.get_trials()[160:]]) < 12


def test_every_kind_of_knob_and_several_objectives():
    def mixed(trial):
        kind = trial.suggest_categorical("kind", ["a", None, "c"])
        rank = trial.suggest_int("rank", 1, 256, log=True)
        return rank + (kind is not None), trial.suggest_float("x", 0, 1, step=0.25)

    study = open_study(None, "s", Ascai(batch=8, elites=4).build(1), ["minimize", "minimize"])
    assert run_trials(study, mixed, trials=64).failed == 0
    assert {t.params["kind"] for t in study.get_trials()} == {"a", None, "c"}
    assert min(t.values[0] for t in study.get_trials()) <= 2


def test_a_share_of_each_round_is_fresh():
    genome_space = [f"n{i}" for i in range(12)]

    def objective(trial):
        return float(sum(trial.suggest_int(n, 0, 8) for n in genome_space))

    study = open_study(None, "s", Ascai(mix=0.0, swap=0.0, perturb=0.0).build(0))
    run_trials(study, objective, trials=200)
    late = [t.values[0] for t in study.get_trials()[100:]]
    assert np.mean(late) == pytest.approx(48, abs=3)  # uniform: nothing is learned
