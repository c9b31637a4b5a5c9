"""The rivals and measures of the two search papers, on a tiny network and random pictures."""

import dataclasses

import numpy as np
import optuna._hypervolume
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput.paper import find_paper
from lilliput.papers import ascai, genecai
from lilliput.papers._policies import Effort, Point, Problem, costs, hyper_volume, mean_and_spread
from lilliput.workload import Workload
from lilliput.zoo import nets

TINY = Effort(evaluations=14, seeds=2, search_pictures=16, held_pictures=16, test_pictures=16, steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = nets.resnet(width=8, depth=8, stem_stride=2)

    def split(n):
        return [{"input": torch.randn(n, 1, 28, 28), "label": torch.randint(10, (n,))}]

    work = Workload.classifier(model, split(16), split(16), split(16), training=split(8))
    return Problem(model, work, split(16))


class Additive:
    """A stand-in whose accuracy and size are sums over knobs, so that the best settings are known."""

    def __init__(self, damage, saving, levels=5):
        self.damage, self.saving, self.levels, self.evaluated = damage, saving, [levels] * len(damage), 0
        self.space = {f"k{i}": optuna.distributions.IntDistribution(0, levels - 1) for i in range(len(damage))}

    def evaluate(self, genome):
        self.evaluated += 1
        x = np.array(genome) / 4
        share = 1 - float(x @ self.saving)
        return Point(tuple(genome), 90 - float(x**2 @ self.damage), share, share)

    def genome_of(self, trial):
        return tuple(trial.suggest_int(n, d.low, d.high) for n, d in self.space.items())

    def uniform(self, rate, rank):
        return (round(4 * rate),) * len(self.levels)

    def held_accuracy(self, genome):
        return self.evaluate(genome).accuracy

    def tuned_accuracy(self, genome, steps, seed):
        return self.evaluate(genome).accuracy + 1


@given(st.lists(st.tuples(st.floats(0, 1.5), st.floats(0, 1.5)), max_size=12))
def test_hyper_volume_is_optunas(pairs):
    inside = np.array([p for p in pairs if p[0] < 1 and p[1] < 1]).reshape(-1, 2)
    expected = optuna._hypervolume.compute_hypervolume(inside, np.ones(2)) if len(inside) else 0.0
    assert hyper_volume(pairs, (1.0, 1.0)) == pytest.approx(expected, abs=1e-12)


def test_costs_by_hand():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1, bias=False), torch.nn.Flatten())
    model.append(torch.nn.Linear(8 * 16, 5))
    assert costs(model, torch.zeros(2, 3, 8, 8)) == (3 * 8 * 9 * 16 + 128 * 5, 216 + 645)


def test_no_compression_is_the_network_itself(problem):
    dense = problem.evaluate((0,) * len(problem.levels))
    assert (dense.macs, dense.size) == (1.0, 1.0)
    assert len(problem.pruned) == 3
    assert len(problem.factored) == 6


def test_every_knob_saves(problem):
    for k, n in enumerate(problem.levels):
        genome = (0,) * k + (n - 1,) + (0,) * (len(problem.levels) - k - 1)
        point = problem.evaluate(genome)
        assert point.size < 1
        assert point.macs < 1
    full = problem.evaluate(problem.uniform(1.0, 1.0))
    assert full.size < 0.5
    assert torch.isfinite(problem.build(full.genome)(torch.randn(2, 1, 28, 28))).all()


def test_held_accuracy_is_counted_on_the_held_pictures(problem):
    genome = problem.uniform(0.5, 0.5)
    model, batch = problem.build(genome), problem.held[0]
    with torch.no_grad():
        right = (model(batch["input"]).argmax(-1) == batch["label"]).sum().item()
    assert problem.held_accuracy(genome) == pytest.approx(100 * right / 16)


def test_an_evaluation_is_done_once(problem, monkeypatch):
    genome = (1,) * len(problem.levels)
    first = problem.evaluate(genome)
    monkeypatch.setattr(problem, "build", None)
    assert problem.evaluate(genome) is first


def test_the_original_is_not_changed(problem):
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    problem.tuned_accuracy(problem.uniform(0.5, 0.5), steps=2, seed=0)
    problem.held_accuracy(problem.uniform(0.5, 0.5))
    assert all(torch.equal(before[k], v) for k, v in problem.model.state_dict().items())


def test_greedy_takes_what_costs_least_for_what_it_saves():
    path = genecai.greedy_path([3, 3], lambda k, g: (g * (10.0 if k == 0 else 1.0), g * 0.1))
    assert path == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]


def test_greedy_finds_the_front_of_an_additive_problem():
    problem = Additive(np.array([20.0, 1.0, 5.0, 0.1]), np.array([0.1, 0.3, 0.2, 0.3]))
    points = genecai.greedy_sensitivity(problem, 40)
    assert len(points) <= 40
    everything = [
        problem.evaluate((a, b, c, d)) for a in range(5) for b in range(5) for c in range(5) for d in range(5)
    ]

    def area(found):
        return hyper_volume([(100 - p.accuracy, p.macs) for p in found], genecai.REFERENCE)

    assert area(points) > 0.99 * area(everything)


@pytest.mark.parametrize("name", ascai.CONTENDERS)
def test_contenders_keep_to_their_evaluations_and_find_something(name):
    problem, floor = Additive(np.linspace(0.05, 6, 8), np.full(8, 0.1)), 84.0
    effort = dataclasses.replace(TINY, evaluations=60)

    def score(point):
        return ascai.point_score(point, floor)

    points = ascai.CONTENDERS[name](problem, effort, score, 0)
    assert len(points) <= 60
    best = ascai.smallest(points, floor)
    assert best.accuracy >= floor
    assert best.size <= 0.8
    if name in ("ascai", "coordinate descent", "CMA-like"):
        assert best.size < ascai.smallest(ascai.bisection(problem, effort, score, 0), floor).size


def test_nothing_at_the_floor_saves_nothing():
    points = [Point((0,), 50.0, 0.2, 0.2), Point((1,), 60.0, 0.5, 0.5)]
    assert ascai.smallest(points, 70.0) == Point((1,), 60.0, 1.0, 1.0)
    assert ascai.smallest(points, 50.0).size == 0.2


@pytest.mark.parametrize("module", [genecai, ascai])
def test_the_whole_comparison_runs(module):
    problem = Additive(np.linspace(0.1, 20, 8), np.full(8, 0.1))
    evidence = module.compare(problem, TINY, seed=1)
    assert {r.name for r in evidence.rows} >= {"random search", module.__name__.rpartition(".")[2]}
    assert isinstance(evidence.holds, bool)
    assert all(np.isfinite(v) for r in evidence.rows for v in r.values.values())
    assert all(r.values["evaluations"] <= TINY.evaluations for r in evidence.rows)
    assert find_paper(module.__name__.rpartition(".")[2]).paper is module.paper


def held(volumes, monkeypatch):
    """What GeneCAI's rule says when the searches find these hyper-volumes."""
    answers = iter([v for name in ("random", "uniform", "greedy", "genecai") for v in volumes[name]])
    monkeypatch.setattr(genecai, "held_volume", lambda *_: next(answers))
    return genecai.compare(Additive(np.ones(3), np.ones(3) / 4), TINY, seed=1).holds


def test_the_rule_can_fail(monkeypatch):
    good = {"random": [0.4, 0.42], "uniform": [0.5], "greedy": [0.45], "genecai": [0.6, 0.62]}
    assert held(good, monkeypatch)
    assert not held({**good, "uniform": [0.61]}, monkeypatch)
    assert not held({**good, "genecai": [0.45, 0.75]}, monkeypatch)


def test_spread_of_one_seed_is_nothing():
    assert mean_and_spread([3.0]) == (3.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
