"""Predictions of a space, corrected by what built candidates really measured, and how well they rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lilliput.budget import Budget
from lilliput.fitting.space import Genome, Space

SHRINK = {"costs": 0.03, "damage": 0.3}  # how strongly coefficients are pulled to 1 while little was measured
LOWEST = 0.05  # of a coefficient
Parts = Mapping[str, float]  # what a prediction is the sum of
Sample = tuple[Genome, Mapping[str, float], float]  # a built candidate: genome, measured quantities, measured damage
Timed = Mapping[Genome, Mapping[str, float]]  # measured but not healed; "damage" is a quick judge's, where there is one


@dataclass
class Predictor:
    """Costs and damage of genomes: sums of the space's parts (a format's products, a family's damage, ...), each times
    a coefficient that `learn` takes from measured candidates."""

    space: Space
    coefficients: dict[str, dict[str, float]] = field(default_factory=dict)  # quantity -> part -> factor
    timed: Timed = field(default_factory=dict)

    def costs(self, genome: Genome) -> dict[str, float]:
        """Budget quantities but `drop`: corrected, or as they were measured where only damage is open."""
        measured = self.timed.get(genome, {})
        parts = self.space.cost_parts(genome)
        return {key: measured[key] if key in measured else self._total(key, parts[key]) for key in parts}

    def damage(self, genome: Genome) -> float:
        """Increase of the loss: corrected, or what the quick judge saw."""
        measured = self.timed.get(genome, {})
        return (
            measured["damage"] if "damage" in measured else self._total("damage", self.space.predicted_damage(genome))
        )

    def _total(self, key: str, parts: Parts) -> float:
        factors = self.coefficients.get(key, {})
        return sum(v * factors.get(name, 1.0) for name, v in parts.items())

    def learn(self, measured: Sequence[Sample]) -> None:
        """Correct from all candidates measured so far."""
        if not measured:
            return
        known = [*((genome, costs) for genome, costs, _ in measured), *self.timed.items()]
        self.space.learn(known)
        seen = [(self.space.cost_parts(genome), costs) for genome, costs in known]
        for key in seen[0][0]:
            pairs = [(parts[key], costs[key]) for parts, costs in seen if key in costs]
            if pairs:
                self.coefficients[key] = regress(*zip(*pairs), shrink=SHRINK["costs"])
        quick = [(genome, costs["damage"]) for genome, costs in self.timed.items() if "damage" in costs]
        judged = quick or [(genome, damage) for genome, _, damage in measured]  # healed ones have another scale
        damages = [self.space.predicted_damage(genome) for genome, _ in judged]
        target = [max(damage, 0.0) for _, damage in judged]
        self.coefficients["damage"] = regress(damages, target, shrink=SHRINK["damage"])


def regress(parts: Sequence[Parts], target: Sequence[float], shrink: float) -> dict[str, float]:
    """Factors of the parts, by relative ridge regression of targets on sums of parts; pulled to 1, not below 0.05."""
    names = sorted({name for part in parts for name in part})
    rows = np.array([[part.get(name, 0.0) for name in names] for part in parts], float)
    used = rows.sum(1) > 0
    if not names or not used.any():
        return {}
    weight = 1 / np.maximum(rows[used].sum(1), 1e-6)
    design, wanted = rows[used] * weight[:, None], np.asarray(target, float)[used] * weight
    gram = design.T @ design + shrink * np.eye(len(names))
    found = np.linalg.solve(gram, design.T @ wanted + shrink)
    return {name: float(max(value, LOWEST)) for name, value in zip(names, found)}


def left_out(
    space: Space, measured: Sequence[Sample], timed: Timed | None = None
) -> list[tuple[dict[str, float], float]]:
    """(costs, damage) of every candidate as predicted from all others, as the search sees one it has not built."""
    return [_unseen(space, measured, timed or {}, genome) for genome, _, _ in measured]


def left_out_timed(space: Space, measured: Sequence[Sample], timed: Timed) -> list[tuple[dict[str, float], float]]:
    """The same of every genome that was only timed and quickly judged."""
    return [_unseen(space, measured, timed, genome) for genome in timed]


def _unseen(space: Space, measured: Sequence[Sample], timed: Timed, genome: Genome) -> tuple[dict[str, float], float]:
    predictor = Predictor(space, timed={g: m for g, m in timed.items() if g != genome})
    predictor.learn([sample for sample in measured if sample[0] != genome])
    return predictor.costs(genome), predictor.damage(genome)


def violation(budget: Budget, costs: Mapping[str, float], margin: float = 0.0) -> float:
    """Sum of the relative excesses over the limits shrunk by `margin`; 0 when all hold."""
    return sum(max(0.0, costs[k] / (limit * (1 - margin)) - 1) for k, limit in budget.limits.items() if k in costs)


def nonnegative_fit(design: np.ndarray, target: np.ndarray, rounds: int = 500) -> np.ndarray:
    """Least squares (rows, k) x = (rows,) with x >= 0 by coordinate descent on scaled columns."""
    scale = np.maximum(np.linalg.norm(design, axis=0), 1e-12)
    columns = design / scale
    gram, wanted = columns.T @ columns + 1e-6 * np.eye(design.shape[1]), columns.T @ target
    x = np.zeros(design.shape[1])
    for _ in range(rounds):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (wanted[i] - gram[i] @ x) / gram[i, i])
    return x / scale


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None with fewer than three pairs or without any variation."""
    if len(a) < 3:
        return None
    ranks = [_ranks(np.asarray(x, float)) for x in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean."""
    order = x.argsort(kind="stable")
    ranks = np.empty(len(x))
    ranks[order] = np.arange(len(x), dtype=float)
    for value in np.unique(x):
        ranks[x == value] = ranks[x == value].mean()
    return ranks
