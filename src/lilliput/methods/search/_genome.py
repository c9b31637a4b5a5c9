"""What the evolutionary samplers share: knobs as a vector in [0, 1]^L, and a study's complete trials decoded once."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

VIOLATION = "violation"  # user attribute of a trial: how far it misses its limits, 0 when it meets them all


def levels(distribution: BaseDistribution) -> int:
    """How many grid values a knob has, 0 when it is continuous (or an integer on a logarithmic scale)."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return int(np.floor((distribution.high - distribution.low) / distribution.step + 1e-8)) + 1
    return 0


def is_ordered(distribution: BaseDistribution) -> bool:
    """Whether neighbouring values are alike: numbers are, and so are choices that are rising or falling numbers."""
    if not isinstance(distribution, CategoricalDistribution):
        return True
    choices = distribution.choices
    if not all(isinstance(c, int | float) and not isinstance(c, bool) for c in choices):
        return False
    steps = np.diff(np.array(choices, dtype=float))
    return bool((steps > 0).all() or (steps < 0).all())


def encode(distribution: BaseDistribution, value: Any) -> float:
    """A knob's value as its place in [0, 1]: the middle of its cell on a grid, a share of the range otherwise."""
    n, x = levels(distribution), distribution.to_internal_repr(value)
    if isinstance(distribution, CategoricalDistribution):
        return (x + 0.5) / n
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if n:
        return (round((x - distribution.low) / (distribution.step or 1)) + 0.5) / n
    low, high = _edges(distribution)
    x = np.log(x) if distribution.log else x
    return float(np.clip((x - low) / (high - low), 0, 1))


def decode(distribution: BaseDistribution, place: float) -> Any:
    """The knob's value at a place in [0, 1]; `decode(d, encode(d, v)) == v` up to rounding of continuous knobs."""
    n = levels(distribution)
    index = min(int(place * n), n - 1)
    if isinstance(distribution, CategoricalDistribution):
        return distribution.to_external_repr(index)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    kind = int if isinstance(distribution, IntDistribution) else float
    if n:
        value = distribution.low + index * (distribution.step or 1)
    else:
        low, high = _edges(distribution)
        value = low + place * (high - low)
        value = np.exp(value) if distribution.log else value
        value = round(value) if kind is int else value
    return kind(min(max(value, distribution.low), distribution.high))


def _edges(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """The range of a continuous knob, in logarithms if it is logarithmic; integers get half a unit on both sides."""
    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - margin, distribution.high + margin
    return (float(np.log(low)), float(np.log(high))) if distribution.log else (low, high)


@dataclass(frozen=True)
class Genome:
    """The code of a search space: parameters <-> vector in [0, 1]^L, in the order in which the knobs are suggested."""

    space: dict[str, BaseDistribution]
    levels: np.ndarray  # (L,) grid values of each knob, 0 when continuous
    ordered: np.ndarray  # (L,) bool

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> Genome:
        """The code of every knob of `space` that has more than one value."""
        varying = {name: d for name, d in space.items() if not d.single()}
        counts = np.array([levels(d) for d in varying.values()], dtype=int)
        return cls(varying, counts, np.array([is_ordered(d) for d in varying.values()], dtype=bool))

    def __len__(self) -> int:
        return len(self.space)

    def encode(self, params: Mapping[str, Any]) -> np.ndarray:
        """Parameters -> (L,)."""
        return np.array([encode(d, params[name]) for name, d in self.space.items()], dtype=float)

    def decode(self, vector: np.ndarray) -> dict[str, Any]:
        """(L,) -> parameters."""
        places = np.clip(vector, 0, 1).tolist()
        return {name: decode(d, place) for (name, d), place in zip(self.space.items(), places, strict=True)}

    def snap(self, vector: np.ndarray) -> np.ndarray:
        """(L,) -> (L,) with grid knobs at the middle of their cells, as `encode` would give them."""
        n = np.maximum(self.levels, 1)
        cells = np.minimum(np.floor(np.clip(vector, 0, 1) * n), n - 1)
        return np.where(self.levels > 0, (cells + 0.5) / n, np.clip(vector, 0, 1))


def reflect(vector: np.ndarray) -> np.ndarray:
    """Places outside [0, 1] folded back inside, so that the ends are not favoured."""
    folded = np.abs(vector) % 2
    return np.where(folded > 1, 2 - folded, folded)


def generator(seed: int, trial: int, name: str = "") -> np.random.Generator:
    """The random numbers of one trial (and knob): they do not depend on what ran before, so that a study resumes."""
    return np.random.default_rng([seed, trial, zlib.crc32(name.encode())])


def fresh_seed(seed: int | None) -> int:
    """`seed`, or one from the system's entropy."""
    return int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed


@dataclass(frozen=True)
class Records:
    """Complete trials in the order of their numbers."""

    vectors: np.ndarray  # (n, L)
    losses: np.ndarray  # (n, objectives), smaller is better
    violations: np.ndarray  # (n,), 0 where every limit is met

    def __len__(self) -> int:
        return len(self.losses)


class History:
    """The complete trials of a study, each decoded once; the knobs are those that all of them share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def __reduce__(self):
        return History, ()  # a pickled sampler reads its study again

    def _reset(self, study: Study | None = None) -> None:
        self._study = weakref.ref(study) if study is not None else None
        self._trials: dict[int, FrozenTrial] = {}
        self._vectors: dict[int, np.ndarray] = {}
        self.genome: Genome | None = None
        self.seen: set[bytes] = set()

    def update(self, study: Study) -> Genome | None:
        """Take in what finished since; the code of the shared knobs, or None before the first complete trial."""
        with self._lock:
            if self._study is None or self._study() is not study:
                self._reset(study)
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if len(complete) > len(self._trials):
                self._take([t for t in complete if t.number not in self._trials])
            return self.genome

    def _take(self, trials: list[FrozenTrial]) -> None:
        """Add trials; when they shrink the shared space, everything is encoded anew."""
        shared = self.genome.space if self.genome else trials[0].distributions
        for t in trials:
            shared = {name: d for name, d in shared.items() if t.distributions.get(name) == d}
        self._trials.update((t.number, t) for t in trials)
        if self.genome is None or len(shared) < len(self.genome):
            self.genome, trials = Genome.of(shared), list(self._trials.values())
        vectors = {t.number: self.genome.encode(t.params) for t in trials}
        self._vectors.update(vectors)
        self.seen.update(v.tobytes() for v in vectors.values())

    def before(self, number: int, directions: list[StudyDirection]) -> Records:
        """The complete trials whose number is smaller."""
        with self._lock:
            numbers = sorted(n for n in self._trials if n < number)
            sign = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions])
            trials = [self._trials[n] for n in numbers]
            losses = np.array([t.values for t in trials], dtype=float).reshape(len(trials), len(directions)) * sign
            vectors = np.array([self._vectors[n] for n in numbers]).reshape(len(trials), -1)
            return Records(vectors, losses, np.array([violation(t) for t in trials], dtype=float))


def violation(trial: FrozenTrial) -> float:
    """How far a trial misses its limits: user attribute `violation`, else the sum of its broken Optuna constraints."""
    if VIOLATION in trial.user_attrs:
        return max(float(trial.user_attrs[VIOLATION]), 0.0)
    return float(sum(max(value, 0.0) for value in trial.constraints.values()))
