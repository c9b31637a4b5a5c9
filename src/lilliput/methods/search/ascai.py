"""Adaptive sampling of per-layer settings as plain vectors: mix, swap and perturb the best, and keep some fresh ones.

Paper: ASCAI, adaptive sampling for acquiring compact AI (arXiv 1911.06471).
A candidate is p in [0, 1]^L and its score s = gain * min(1, exp((A - A0) / T)): the compression, cut down steeply where
accuracy A falls below the floor A0. That form, the shares of the proposals and the schedule are (reconstructed).
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

TRIES = 20  # how often a candidate that ran before is proposed anew


@dataclass(frozen=True)
class Ascai(Settings):
    """Adaptive sampling; trial k belongs to round k // batch, most of a round is made of the elites before it."""

    batch: int = knob(20, low=2, high=1000, help="samples of a round")
    elites: int = knob(10, low=2, high=1000, help="best samples so far that new ones are made of")
    mix: float = knob(0.25, low=0.0, high=1.0, help="share of convex combinations of two elites")
    swap: float = knob(0.25, low=0.0, high=1.0, help="share of elites that take coordinates of another")
    perturb: float = knob(0.4, low=0.0, high=1.0, help="share of elites with Gaussian noise; the rest is uniform")
    spread: float = knob(0.3, low=0.0, high=1.0, help="noise of the first round, as a share of the range")
    shrink: float = knob(0.9, low=0.1, high=1.0, help="factor on the noise after each round")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="search")
    paper: ClassVar[str] = "ascai"

    def build(self, seed: int | None = None, objectives: int = 1) -> AscaiSampler:
        """The Optuna sampler; several objectives are made one, see `scalarise`."""
        return AscaiSampler(self, seed)


class AscaiSampler(BaseSampler):
    """Optuna sampler of ASCAI; all its state is in the study's complete trials, so it resumes and can be shared."""

    def __init__(self, settings: Ascai | None = None, seed: int | None = None):
        self.settings = settings or Ascai()
        self.seed = fresh_seed(seed)
        self._history = History()
        self._elites: tuple[Any, np.ndarray] = (None, np.empty((0, 0)))

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
        turn = trial.number // self.settings.batch
        elites = self._select(study, turn)
        vector = genome.snap(rng.random(len(genome)))
        for _ in range(TRIES if len(elites) >= 2 else 0):
            vector = genome.snap(self._propose(genome, elites, turn, rng))
            if vector.tobytes() not in self._history.seen:
                break
        return genome.decode(vector)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution) -> Any:
        return decode(param_distribution, generator(self.seed, trial.number, param_name).random())

    def _select(self, study: Study, turn: int) -> np.ndarray:
        """(elites, L) best samples of the rounds before, best first."""
        first = turn * self.settings.batch
        records = self._history.before(first, study.directions) if turn else None
        if records is None:
            return np.empty((0, 0))
        key = (study.study_name, first, records.vectors.shape)
        if self._elites[0] != key:
            best = np.argsort(scalarise(records), kind="stable")[: self.settings.elites]
            self._elites = (key, records.vectors[best])
        return self._elites[1]

    def _propose(self, genome: Genome, elites: np.ndarray, turn: int, rng: np.random.Generator) -> np.ndarray:
        """One new vector, (L,), by one of the four proposals."""
        s = self.settings
        a, b = elites[rng.permutation(len(elites))[:2]]
        kind = rng.random()
        if kind < s.mix:
            return mix(a, b, genome, rng)
        if kind < s.mix + s.swap:
            return swap(a, b, rng)
        if kind < s.mix + s.swap + s.perturb:
            return perturb(a, genome, s.spread * s.shrink ** (turn - 1), rng)
        return rng.random(len(genome))


def mix(a: np.ndarray, b: np.ndarray, genome: Genome, rng: np.random.Generator) -> np.ndarray:
    """(L,), (L,) -> their convex combination; knobs without an order come from one of the two."""
    weight = rng.random()
    either = np.where(rng.random(len(a)) < weight, a, b)
    return np.where(genome.ordered, weight * a + (1 - weight) * b, either)


def swap(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(L,), (L,) -> a with a random share of its coordinates from b."""
    return np.where(rng.random(len(a)) < rng.random(), b, a)


def perturb(a: np.ndarray, genome: Genome, spread: float, rng: np.random.Generator) -> np.ndarray:
    """(L,) -> a with Gaussian noise on about a tenth of its coordinates; at least half a cell, or nothing would move.

    Noise on all coordinates at once would lose everything an elite has gained when there are many knobs.
    """
    moved = rng.random(len(a)) < max(0.1, 2 / len(a))
    least = np.where(genome.levels > 0, 0.75 / np.maximum(genome.levels, 1), 0.01)
    noisy = reflect(a + rng.standard_normal(len(a)) * np.maximum(spread, least))
    return np.where(moved, np.where(genome.ordered, noisy, rng.random(len(a))), a)


def scalarise(records: Records) -> np.ndarray:
    """One loss per trial, (n,), smaller is better: the mean of the objectives, each scaled to 0..1 over the trials.

    A trial with a violation loses to every trial without one, and to those with a smaller violation.
    """
    finite = np.nan_to_num(records.losses, posinf=1e30, neginf=-1e30)
    low, high = finite.min(axis=0), finite.max(axis=0)
    scaled = (finite - low) / np.where(high > low, high - low, 1)
    return np.where(records.violations > 0, 1 + records.violations, scaled.mean(axis=1))


def floor_score(gain: float, accuracy: float, floor: float, temperature: float) -> float:
    """gain * min(1, exp((accuracy - floor) / temperature)): the paper's target, larger is better."""
    return gain * min(1.0, float(np.exp((accuracy - floor) / temperature)))
