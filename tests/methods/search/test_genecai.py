"""GeneCAI's maths against brute force, and its search against random sampling."""

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from lilliput.errors import UserError
from lilliput.fitting.study import close_study, open_study, run_trials
from lilliput.method import find_method
from lilliput.methods.search._genome import Genome, Records, generator
from lilliput.methods.search.genecai import (
    Genecai,
    crowding,
    first_front,
    nudge,
    pareto_ranks,
    splice,
    survivors,
    tournament,
)

SPACE = {f"layer{i}": IntDistribution(0, 8) for i in range(20)}


def separable(target):
    def objective(trial):
        x = [trial.suggest_int(name, d.low, d.high) for name, d in SPACE.items()]
        return float(sum((a - b) ** 2 for a, b in zip(x, target, strict=True)))

    return objective


def two_sided(trial):
    """Size against damage, with layers of very different sensitivity."""
    x = np.array([trial.suggest_int(name, d.low, d.high) for name, d in SPACE.items()]) / 8
    return float((np.arange(1, 21) * x**2).sum() / 210), float((1 - x).mean())


def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


LOSSES = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=25)


@given(LOSSES, st.integers(1, 3))
def test_ranks_are_those_of_brute_force(rows, objectives):
    losses = np.array(rows, dtype=float)[:, :objectives]
    expected, left, rank = np.zeros(len(rows), dtype=int), set(range(len(rows))), 0
    while left:
        front = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        expected[list(front)] = rank
        left, rank = left - front, rank + 1
    assert pareto_ranks(losses, np.zeros(len(rows))).tolist() == expected.tolist()
    assert first_front(losses).tolist() == (expected == 0).tolist()


@given(LOSSES, st.data())
def test_feasible_trials_come_first_and_the_others_by_violation(rows, data):
    losses = np.array(rows, dtype=float)
    violations = np.array(data.draw(st.lists(st.sampled_from([0, 0, 0.5, 2]), min_size=len(rows), max_size=len(rows))))
    ranks, met = pareto_ranks(losses, violations), violations == 0
    assert ranks[met].tolist() == pareto_ranks(losses[met], violations[met]).tolist()
    for a in range(len(rows)):
        for b in range(len(rows)):
            if violations[a] < violations[b]:
                assert ranks[a] < ranks[b]
            elif violations[a] == violations[b] > 0:
                assert ranks[a] == ranks[b]


def test_ranks_are_exact_up_to_the_limit():
    losses = np.random.default_rng(0).random((200, 2))
    full, cut = pareto_ranks(losses, np.zeros(200)), pareto_ranks(losses, np.zeros(200), limit=30)
    best = np.argsort(full, kind="stable")[:30]
    assert (full[best] == cut[best]).all()
    assert cut.max() < full.max()


def test_crowding_is_the_distance_of_the_neighbours():
    losses = np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [2.0, 1.0]])
    assert crowding(losses).tolist() == [np.inf, 2 / 4 + 3 / 4, np.inf, 3 / 4 + 2 / 4]
    assert crowding(np.array([[1.0, 2.0]])).tolist() == [np.inf]
    assert not np.isnan(crowding(np.array([[1.0, np.inf], [np.inf, 1.0], [2.0, 2.0]]))).any()


def test_survivors_keep_the_ends_of_a_front_that_is_too_long():
    losses = np.stack([np.arange(10.0), -np.arange(10.0)], 1)
    records = Records(np.zeros((10, 1)), losses, np.zeros(10))
    kept = survivors(records, 4)
    assert {0, 9} <= set(kept.tolist())
    assert len(kept) == 4


def test_splice_takes_runs_of_the_second_parent():
    rng = generator(0, 0)
    changes = []
    for _ in range(200):
        child = splice(np.zeros(30), np.ones(30), rng, segments=2)
        changes.append(int(np.abs(np.diff(np.concatenate([[0], child, [0]]))).sum()))
    assert max(changes) == 4  # two runs: two starts and two ends
    assert min(changes) < 4


def test_nudge_moves_to_neighbours_and_nothing_else():
    space = {"n": IntDistribution(0, 8), "x": FloatDistribution(0, 1), "c": CategoricalDistribution(["a", "b", "c"])}
    genome, rng = Genome.of(space), generator(0, 0)
    start = genome.encode({"n": 0, "x": 0.0, "c": "b"})
    moved = [genome.decode(nudge(start, genome, rng, mutations=3.0, step=0.0)) for _ in range(50)]
    assert {m["n"] for m in moved} == {1}  # from the end there is one neighbour
    assert {m["c"] for m in moved} == {"a", "c"}
    wide = [genome.decode(nudge(start, genome, rng, mutations=3.0, step=0.3)) for _ in range(200)]
    assert max(m["n"] for m in wide) > 3
    assert 0 <= min(m["x"] for m in wide) < max(m["x"] for m in wide) <= 1
    assert np.array_equal(nudge(start, genome, rng, mutations=0.0, step=0.3), start)
    yes_no = Genome.of({"b": CategoricalDistribution([False, True])})
    assert {yes_no.decode(nudge(np.array([0.25]), yes_no, rng, 1.0, 0.1))["b"] for _ in range(20)} == {True}


def test_tournaments_prefer_the_front_of_the_list():
    rng = generator(0, 0)
    drawn = np.bincount([tournament(10, rng) for _ in range(5000)], minlength=10)
    assert drawn[0] / 5000 == pytest.approx(0.19, abs=0.03)
    assert drawn[-1] / 5000 == pytest.approx(0.01, abs=0.01)


def test_better_than_random_on_a_separable_problem():
    def best(sampler, seed):
        target = np.random.default_rng(seed).integers(0, 9, len(SPACE)).tolist()
        study = open_study(None, "s", sampler)
        run_trials(study, separable(target), trials=160)
        return study.best_value

    ours = np.median([best(Genecai().build(seed), seed) for seed in range(5)])
    random = np.median([best(RandomSampler(seed=seed), seed) for seed in range(5)])
    assert ours < 0.7 * random


def test_a_better_front_than_random():
    def area(sampler):
        study = open_study(None, "s", sampler, ["minimize", "minimize"])
        run_trials(study, two_sided, trials=300)
        front = sorted(tuple(t.values) for t in study.best_trials)
        ends = [*(x for x, _ in front[1:]), 1.0]
        return sum((end - x) * (1 - y) for (x, y), end in zip(front, ends, strict=True))

    ours = np.median([area(Genecai().build(seed, 2)) for seed in range(3)])
    random = np.median([area(RandomSampler(seed=seed)) for seed in range(3)])
    assert ours > random + 0.02


def test_limits_are_met_first():
    def limited(trial):
        x = [trial.suggest_int(name, d.low, d.high) for name, d in SPACE.items()]
        trial.set_user_attr("violation", max(0, sum(x) - 40))  # random trials have 80
        return -float(sum(x))

    study = open_study(None, "s", Genecai().build(0))
    run_trials(study, limited, trials=240)
    met = [t for t in study.get_trials() if t.user_attrs["violation"] == 0]
    assert len(met) > 20  # one random trial in some thousands meets it
    assert max(-t.values[0] for t in met) >= 37


def mixed(trial):
    kind = trial.suggest_categorical("kind", ["a", None, "c"])
    x = trial.suggest_float("x", 1e-4, 1.0, log=True) + (kind is not None) + trial.suggest_int("n", 0, 3)
    return x + trial.suggest_int("fixed", 2, 2) + (trial.suggest_float("extra", 0, 1) if kind == "a" else 0)


def test_every_kind_of_knob_and_knobs_that_come_and_go():
    study = open_study(None, "s", Genecai(population=10).build(3))
    ran = run_trials(study, mixed, trials=80)
    assert ran.failed == 0
    assert study.best_value < 2.05
    assert study.best_params["kind"] is None


def test_the_queue_comes_first_and_breeds():
    target = [3] * len(SPACE)
    study = open_study(None, "s", Genecai(population=10).build(0))
    study.enqueue_trial(dict.fromkeys(SPACE, 3))
    run_trials(study, separable(target), trials=30)
    trials = study.get_trials()
    assert trials[0].values == [0.0]
    assert min(t.values[0] for t in trials[10:]) < 0.5 * min(t.values[0] for t in trials[1:10])


def test_no_trial_is_run_twice():
    study = open_study(None, "s", Genecai(population=6).build(0))
    run_trials(study, separable([4] * len(SPACE)), trials=150)
    assert len({tuple(t.params.values()) for t in study.get_trials()}) == 150


@pytest.mark.parametrize("name", ["genecai", "ascai"])
def test_a_resumed_search_goes_on_as_if_never_stopped(tmp_path, name):
    settings = find_method(f"search.{name}")()
    whole = open_study(None, "s", settings.build(5))
    run_trials(whole, separable([2] * len(SPACE)), trials=70)
    for total in (13, 41, 70):
        part = open_study(tmp_path / "s.db", "s", settings.build(5))
        run_trials(part, separable([2] * len(SPACE)), trials=total, durable=False)
        if total < 70:
            close_study(part)
    assert [t.params for t in part.get_trials()] == [t.params for t in whole.get_trials()]
    close_study(part)


def test_settings_are_found_and_checked():
    for name in ("genecai", "ascai", "random", "tpe", "nsga2"):
        kind = find_method(f"search.{name}")
        assert kind.facts.effect == "search"
        study = optuna.create_study(directions=["minimize"] * 2, sampler=kind().build(1, 2))
        study.optimize(lambda t: (t.suggest_int("a", 0, 9), t.suggest_float("b", 0, 1)), n_trials=3)
    with pytest.raises(UserError, match="population is 1"):
        Genecai(population=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_differ_and_repeat(seed):
    def run(s):
        study = open_study(None, "s", Genecai().build(s))
        run_trials(study, separable([1] * len(SPACE)), trials=30)
        return [t.params for t in study.get_trials()]

    assert run(seed) == run(seed)
    assert run(seed) != run(seed + 10)
