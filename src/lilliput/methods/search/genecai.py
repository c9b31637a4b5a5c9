"""Evolve per-layer settings: Pareto rank and crowding, tournaments, exchange of layer segments, nudges to a neighbour.

Paper: GeneCAI, genetic evolution for acquiring compact AI (arXiv 2004.04249).
A genome is the vector of all knobs in model order; child = nudge(a with some runs of knobs of b), and the population is
the best by (feasible, Pareto rank, crowding distance) of everything that ran. The details of the operators are
(reconstructed): the paper's code is not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from lilliput.method import Facts, Settings, knob
from lilliput.methods.search._genome import Genome, History, Records, decode, fresh_seed, generator, reflect

TRIES = 20  # how often a child that ran before is nudged on


@dataclass(frozen=True)
class Genecai(Settings):
    """Genetic search; trial k belongs to generation k // population, whatever started or ran it."""

    population: int = knob(20, low=4, high=1000, help="trials of a generation, and parents that are kept")
    crossover: float = knob(0.9, low=0.0, high=1.0, help="share of children with two parents")
    segments: int = knob(4, low=1, high=100, help="runs of consecutive knobs that a child takes from its second parent")
    mutations: float = knob(2.0, low=0.0, high=50.0, help="expected number of nudged knobs in a child")
    step: float = knob(0.3, low=0.0, high=1.0, help="spread of a nudge as a share of the range; at least one value")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="search")
    paper: ClassVar[str] = "genecai"

    def build(self, seed: int | None = None, objectives: int = 1) -> GenecaiSampler:
        """The Optuna sampler; it takes any number of objectives."""
        return GenecaiSampler(self, seed)


class GenecaiSampler(BaseSampler):
    """Optuna sampler of GeneCAI; all its state is in the study's complete trials, so it resumes and can be shared.

    The first generation is random plus whatever was enqueued. Trials with a user attribute `violation` above 0 (or
    broken Optuna constraints) rank after all others, by that number.
    """

    def __init__(self, settings: Genecai | None = None, seed: int | None = None):
        self.settings = settings or Genecai()
        self.seed = fresh_seed(seed)
        self._history = History()
        self._parents: tuple[Any, np.ndarray] = (None, np.empty((0, 0)))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        genome = self._history.update(study)
        return dict(genome.space) if genome else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        genome = self._history.genome
        if not search_space or genome is None:
            return {}
        rng = generator(self.seed, trial.number)
        parents = self._select(study, trial.number // self.settings.population)
        if len(parents) < 2:
            return genome.decode(rng.random(len(genome)))
        return genome.decode(self._breed(genome, parents, rng))

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution) -> Any:
        return decode(param_distribution, generator(self.seed, trial.number, param_name).random())

    def _select(self, study: Study, generation: int) -> np.ndarray:
        """(population, L) parents of a generation, best first; computed once unless a straggler finished."""
        first = generation * self.settings.population
        records = self._history.before(first, study.directions) if generation else None
        if records is None:
            return np.empty((0, 0))
        key = (study.study_name, first, records.vectors.shape)
        if self._parents[0] != key:
            self._parents = (key, records.vectors[survivors(records, self.settings.population)])
        return self._parents[1]

    def _breed(self, genome: Genome, parents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        child = parents[tournament(len(parents), rng)]
        if rng.random() < self.settings.crossover:
            child = splice(child, parents[tournament(len(parents), rng)], rng, self.settings.segments)
        child = nudge(child, genome, rng, self.settings.mutations, self.settings.step)
        for _ in range(TRIES):
            if child.tobytes() not in self._history.seen:
                break
            child = nudge(child, genome, rng, max(self.settings.mutations, 1.0), self.settings.step)
        return child


def tournament(n: int, rng: np.random.Generator) -> int:
    """The better of two places drawn among n that are sorted best first."""
    return int(rng.integers(n, size=2).min())


def splice(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, segments: int = 1) -> np.ndarray:
    """(L,), (L,) -> a with up to `segments` contiguous runs of knobs from b."""
    cuts = np.sort(rng.integers(len(a) + 1, size=2 * segments))
    inside = np.searchsorted(cuts, np.arange(len(a)), side="right") % 2 == 1
    return np.where(inside, b, a)


def nudge(vector: np.ndarray, genome: Genome, rng: np.random.Generator, mutations: float, step: float) -> np.ndarray:
    """(L,) -> (L,) with about `mutations` knobs moved: to a near value, or to any other one if they have no order."""
    size = len(genome)
    moved = rng.random(size) < mutations / size
    n = np.maximum(genome.levels, 1)
    noise = rng.standard_normal(size) * step
    cells = np.floor(vector * n)
    hops = np.where(noise < 0, -1, 1) * np.maximum(np.rint(np.abs(noise) * (n - 1)), 1)
    near = _fold(cells + hops, n)
    other = (cells + 1 + np.floor(rng.random(size) * (n - 1))) % n
    on_grid = (np.where(genome.ordered, near, other) + 0.5) / n
    return np.where(moved, np.where(genome.levels > 0, on_grid, reflect(vector + noise)), vector)


def _fold(cells: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Cells beyond the ends of 0..n-1 mirrored inside; a hop of one from an end lands on its only neighbour."""
    cells = np.abs(cells)
    return np.clip(np.where(cells > n - 1, 2 * (n - 1) - cells, cells), 0, n - 1)


def survivors(records: Records, size: int) -> np.ndarray:
    """Indices of the best `size` trials, best first: feasible, then Pareto rank, then the loneliest of a front."""
    ranks = pareto_ranks(records.losses, records.violations, size)
    lonely = np.zeros(len(records))
    for rank in np.unique(ranks[ranks <= np.sort(ranks)[:size][-1]]) if len(records) else ():
        front = np.flatnonzero(ranks == rank)
        lonely[front] = crowding(records.losses[front])
    return np.lexsort((np.arange(len(records)), -lonely, ranks))[:size]


def pareto_ranks(losses: np.ndarray, violations: np.ndarray, limit: int | None = None) -> np.ndarray:
    """(n, objectives), (n,) -> (n,) fronts from 0; exact for at least the best `limit`, the others share the last.

    Feasible trials come first, by dominance; the others after them, by the size of their violation.
    """
    limit = len(losses) if limit is None else limit
    ranks = np.zeros(len(losses), dtype=int)
    left, rank = np.flatnonzero(violations <= 0), 0
    while len(left) and limit > 0:
        front = first_front(losses[left])
        ranks[left[front]] = rank
        limit -= int(front.sum())
        left, rank = left[~front], rank + 1
    ranks[left] = rank
    broken = violations > 0
    ranks[broken] = rank + 1 + np.unique(violations[broken], return_inverse=True)[1].reshape(-1)
    return ranks


def first_front(losses: np.ndarray) -> np.ndarray:
    """(n, objectives) -> (n,) bool: dominated by none."""
    left = np.lexsort(losses.T[::-1])  # the first of what is left is never dominated by the rest
    front = np.zeros(len(losses), dtype=bool)
    while len(left):
        head = losses[left[0]]
        front[left[(losses[left] == head).all(1)]] = True
        left = left[(losses[left] < head).any(1)]
    return front


def crowding(losses: np.ndarray) -> np.ndarray:
    """(n, objectives) of one front -> (n,) distance to the neighbours in units of the range; infinite at the ends."""
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        distance[order[[0, -1]]] = np.inf
        span = column[order[-1]] - column[order[0]]
        if 0 < span < np.inf:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
