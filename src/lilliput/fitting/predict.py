"""Predictions of a space, corrected by what built candidates really measured, and how well they rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lilliput.budget import Budget
from lilliput.fitting.space import Genome, Space

SHRINK = 0.3  # how strongly a coefficient is pulled to 1 while few candidates were measured


@dataclass
class Predictor:
    """Costs and damage of genomes. `learn` takes measured candidates; ratios correct costs, family weights damage."""

    space: Space
    ratio: dict[str, float] = field(default_factory=dict)
    family: dict[str, float] = field(default_factory=dict)

    def costs(self, genome: Genome) -> dict[str, float]:
        """Corrected budget quantities but `drop`."""
        return {k: v * self.ratio.get(k, 1.0) for k, v in self.space.costs(genome).items()}

    def damage(self, genome: Genome) -> float:
        """Corrected increase of the loss."""
        return sum(v * self.family.get(k, 1.0) for k, v in self.space.predicted_damage(genome).items())

    def learn(self, measured: Sequence[tuple[Genome, Mapping[str, float], float]]) -> None:
        """Correct from (genome, measured quantities, measured damage) of all candidates so far."""
        if not measured:
            return
        raw = [self.space.costs(genome) for genome, _, _ in measured]
        for key in raw[0]:
            ratios = [m[key] / r[key] for r, (_, m, _) in zip(raw, measured) if key in m and r[key] > 0]
            if ratios:
                self.ratio[key] = float(np.median(ratios))
        self._learn_damage(measured)

    def _learn_damage(self, measured) -> None:
        """Relative ridge regression of measured damage on the families' predictions, coefficients not below 0.05."""
        parts = [self.space.predicted_damage(genome) for genome, _, _ in measured]
        names = sorted({name for part in parts for name in part})
        if not names:
            return
        rows = np.array([[part.get(name, 0.0) for name in names] for part in parts])
        target = np.array([max(damage, 0.0) for _, _, damage in measured])
        weight = 1 / np.maximum(rows.sum(1), 1e-6)
        design, wanted = rows * weight[:, None], target * weight
        gram = design.T @ design + SHRINK * np.eye(len(names))
        found = np.linalg.solve(gram, design.T @ wanted + SHRINK * np.ones(len(names)))
        self.family = {name: float(max(value, 0.05)) for name, value in zip(names, found)}


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
