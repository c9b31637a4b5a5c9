"""Predictions are sums of parts, and measured candidates correct each part."""

import numpy as np
import pytest
from scipy import optimize, stats

from lilliput.budget import Budget
from lilliput.fitting.predict import Predictor, left_out, nonnegative_fit, rank_correlation, regress, violation
from lilliput.fitting.search import lagrangian_seeds, search
from lilliput.fitting.space import Option, Space, Unit, greedy
from lilliput.methods.prune.neurons import Neurons
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8


class Toy(Space):
    """Twelve units, each float, 8 or 4 bits; times and bytes by format."""

    MS, BYTES = {"float32": 4.0, "int8": 2.0, "int4": 1.0}, {"float32": 32.0, "int8": 8.0, "int4": 4.0}

    def __init__(self, units: int = 12, seed: int = 0):
        options = (Option("float32"), Option("int8", Int8()), Option("int4", Group(bits=4, group=32)))
        super().__init__([Unit(f"layer {i}", (f"layer.{i}",), options) for i in range(units)])
        draw = np.random.default_rng(seed)
        self.damage = [np.array([0.0, d, 8 * d]) for d in draw.lognormal(-4, 1.5, units)]
        self.sizes_of = draw.integers(1, 5, units)

    def cost_parts(self, genome):
        ms = {"overhead": 10.0}
        size = 0.0
        for unit, choice, n in zip(self.units, genome, self.sizes_of):
            label = unit.options[choice].label
            ms[label] = ms.get(label, 0.0) + n * self.MS[label]
            size += n * self.BYTES[label]
        return {"token_ms": ms, "size_bytes": {"weights": size}}


def random_genomes(count, units=12, seed=0):
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, 3, units).tolist()) for _ in range(count)]


def test_learning_finds_the_true_factor_of_every_part():
    space, true = Toy(), {"overhead": 0.4, "float32": 1.3, "int8": 0.7, "int4": 1.1}
    measured = [
        (g, {"token_ms": sum(v * true[k] for k, v in space.cost_parts(g)["token_ms"].items())}, 0.0)
        for g in random_genomes(60)
    ]
    predictor = Predictor(space)
    predictor.learn(measured)
    genome = (0, 1, 2) * 4
    wanted = sum(v * true[k] for k, v in space.cost_parts(genome)["token_ms"].items())
    assert predictor.costs(genome)["token_ms"] == pytest.approx(wanted, rel=0.02)
    assert Predictor(space).costs(genome)["token_ms"] != pytest.approx(wanted, rel=0.02)
    assert predictor.costs(genome)["size_bytes"] == space.costs(genome)["size_bytes"]  # not measured: as it was


def test_what_was_timed_costs_what_was_measured_and_teaches_the_others():
    space, known, other = Toy(), (1,) * 12, (1,) * 11 + (2,)
    predictor = Predictor(space, timed={known: {"token_ms": 7.0}})
    before = predictor.costs(other)["token_ms"]
    predictor.learn([((0,) * 12, space.costs((0,) * 12), 0.0)])
    assert predictor.costs(known)["token_ms"] == 7.0
    assert predictor.costs(known)["size_bytes"] == space.costs(known)["size_bytes"]
    assert predictor.costs(other)["token_ms"] < before  # 7 is less than had been predicted
    sample = (known, {"token_ms": 99.0}, 0.0)
    assert (
        left_out(space, [sample], timed={known: {"token_ms": 7.0}})[0][0]["token_ms"] == space.costs(known)["token_ms"]
    )


def test_regression_agrees_with_lstsq_and_shrinks_to_one():
    draw = np.random.default_rng(1)
    rows = draw.uniform(0.1, 1, (40, 3))
    parts = [dict(zip("abc", row)) for row in rows]
    target = rows @ [0.5, 2.0, 1.5]
    weight = 1 / rows.sum(1)
    wanted = np.linalg.lstsq(rows * weight[:, None], target * weight, rcond=None)[0]
    assert list(regress(parts, target, shrink=0.0).values()) == pytest.approx(wanted.tolist())
    assert list(regress(parts, target, shrink=1e9).values()) == pytest.approx([1, 1, 1], abs=1e-3)
    assert min(regress([{"a": 1.0}], [-5.0], shrink=0.0).values()) == 0.05
    assert regress([{}, {"a": 0.0}], [1.0, 1.0], shrink=0.1) == {}


def test_damage_is_corrected_by_family():
    space = Toy()
    measured = [(g, {}, 3.0 * sum(space.predicted_damage(g).values())) for g in random_genomes(30)]
    predictor = Predictor(space)
    predictor.learn(measured)
    assert predictor.damage(random_genomes(1, seed=9)[0]) == pytest.approx(
        3.0 * sum(space.predicted_damage(random_genomes(1, seed=9)[0]).values()), rel=0.05
    )


def test_what_was_judged_quickly_teaches_instead_of_what_was_healed():
    space, known, other = Toy(), (2,) * 12, (2,) * 11 + (1,)
    seen = 5.0 * sum(space.predicted_damage(known).values())
    predictor = Predictor(space, timed={known: {"damage": seen}})
    assert predictor.damage(known) == seen
    assert predictor.damage(other) == pytest.approx(sum(space.predicted_damage(other).values()))
    predictor.learn([(other, {}, 1e-9)])
    assert predictor.damage(other) > 2 * sum(space.predicted_damage(other).values())


def test_left_out_predictions_do_not_see_their_own_candidate():
    space = Toy()
    measured = [(g, {"token_ms": space.costs(g)["token_ms"]}, 0.1) for g in random_genomes(6)]
    before = left_out(space, measured)[2][0]["token_ms"]
    genome, values, damage = measured[2]
    measured[2] = (genome, {"token_ms": values["token_ms"] * 100}, damage)
    assert left_out(space, measured)[2][0]["token_ms"] == before
    assert left_out(space, measured)[3] != left_out(space, measured[:2] + measured[3:])[2]


def test_greedy_finds_the_optimum_of_a_sum():
    draw = np.random.default_rng(3)
    table = draw.normal(size=(6, 4))
    found = greedy([4] * 6, lambda g: sum(table[i, o] for i, o in enumerate(g)))
    assert found == tuple(table.argmin(1).tolist())


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_first_seed_meets_the_budget_and_random_search_does_not_beat_it(share):
    space = Toy()
    base = space.costs((0,) * 12)
    budget = Budget(f"time_per_token<={base['token_ms'] * max(share, 0.5)}ms, size<={base['size_bytes'] * share}B")
    predictor = Predictor(space)
    first = lagrangian_seeds(predictor, budget, 0.0)[0]
    assert violation(budget, predictor.costs(first)) == 0
    best = search(predictor, budget, sampler="random", trials=200, margin=0.0, seeded=False)[0]
    assert violation(budget, predictor.costs(best)) > 0 or predictor.damage(first) <= predictor.damage(best)


@pytest.mark.parametrize("size", [150, 250, 400, 600])
def test_nothing_of_the_budget_is_left_that_would_save_damage(size):
    predictor, budget = Predictor(Toy()), Budget(f"size<={size}B")
    first = lagrangian_seeds(predictor, budget, 0.0)[0]
    for unit, choice in enumerate(first):
        for less in range(choice):
            better = (*first[:unit], less, *first[unit + 1 :])
            assert violation(budget, predictor.costs(better)) > 0


def test_searching_from_the_seeds_is_never_worse_than_them():
    predictor, budget = Predictor(Toy()), Budget("size<=250B")
    first = lagrangian_seeds(predictor, budget, 0.0)[0]
    found = search(predictor, budget, trials=60, margin=0.0)
    assert predictor.damage(found[0]) <= predictor.damage(first)
    assert violation(budget, predictor.costs(found[0])) == 0
    assert len(set(found)) == len(found)


def test_violation_adds_relative_excesses():
    budget = Budget("time_per_token<=10ms, size<=100B, drop<=1%")
    assert violation(budget, {"token_ms": 15.0, "size_bytes": 110.0}) == pytest.approx(0.6)
    assert violation(budget, {"token_ms": 9.0, "size_bytes": 100.0}) == 0
    assert violation(budget, {"token_ms": 9.0}, margin=0.2) == pytest.approx(0.125)


def test_rank_correlation_agrees_with_scipy():
    draw = np.random.default_rng(5)
    a, b = draw.integers(0, 6, 25).astype(float), draw.normal(size=25)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_nonnegative_fit_agrees_with_scipy():
    draw = np.random.default_rng(6)
    design, target = draw.normal(size=(30, 5)), draw.normal(size=30)
    assert nonnegative_fit(design, target) == pytest.approx(optimize.nnls(design, target)[0], abs=1e-4)


def test_plans_put_prunings_first_and_keep_settings_per_layer():
    both = (Option("keep"), Option("-25% neurons", Neurons(ratio=0.25)), Option("-50% neurons", Neurons(ratio=0.5)))
    space = Toy(2)
    space.units.append(Unit("ffn", ("mlp.0",), both))
    space.units.append(Unit("ffn 2", ("mlp.1",), both))
    plan = space.plan((1, 2, 1, 2))
    assert [s.method.name() for s in plan.steps] == ["prune.neurons", "quantize.int8", "quantize.group"]
    assert plan.steps[0].layers == {"mlp.0": {}, "mlp.1": {"ratio": 0.5}}
    assert space.uniform({"*": "int8"}) == (1, 1, 0, 0)
