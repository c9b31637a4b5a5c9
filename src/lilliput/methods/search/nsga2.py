"""The standard multi-objective genetic algorithm (Optuna's NSGAIISampler).

Paper: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II (IEEE TEVC 2002).
The next generation is the best by (Pareto rank, crowding distance) of parents and children.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna.samplers import NSGAIISampler

from lilliput.method import Facts, Settings, knob


@dataclass(frozen=True)
class Nsga2(Settings):
    """NSGA-II with uniform crossover."""

    population: int = knob(40, low=2, high=1000, help="trials of a generation")
    crossover: float = knob(0.9, low=0.0, high=1.0, help="share of children with two parents")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="search")

    def build(self, seed: int | None = None, objectives: int = 1) -> NSGAIISampler:
        """The Optuna sampler."""
        return NSGAIISampler(population_size=self.population, crossover_prob=self.crossover, seed=seed)
