"""Figures of contenders, one per seed: their rows, and what one has more than another."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lilliput.paper import Row


class BySeed:
    """contender -> quantity -> a figure for each seed."""

    def __init__(self):
        self.found: dict[str, dict[str, list[float]]] = {}

    def note(self, contender: str, figures: Mapping[str, float]) -> None:
        """Add the figures of one seed."""
        for quantity, value in figures.items():
            self.found.setdefault(contender, {}).setdefault(quantity, []).append(value)

    def mean(self, contender: str, quantity: str) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.found[contender][quantity])

    def rows(self) -> list[Row]:
        """Means over seeds with standard deviations."""
        return [
            Row(name, {k: statistics.fmean(v) for k, v in one.items()}, {k: deviation(v) for k, v in one.items()})
            for name, one in self.found.items()
        ]

    def more(self, contender: str, other: str, quantity: str) -> tuple[float, float]:
        """What a contender has more than another: mean over seeds and its standard error, unknown of a single seed."""
        pairs = zip(self.found[contender][quantity], self.found[other][quantity])
        gains = [a - b for a, b in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
        return statistics.fmean(gains), error


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
