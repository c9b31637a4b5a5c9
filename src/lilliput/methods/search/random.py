"""Uniform random search, the baseline of every other (Optuna's RandomSampler)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna.samplers import RandomSampler

from lilliput.method import Facts, Settings


@dataclass(frozen=True)
class Random(Settings):
    """Every knob uniform over its range."""

    facts: ClassVar[Facts] = Facts(stage="serve", effect="search")

    def build(self, seed: int | None = None, objectives: int = 1) -> RandomSampler:
        """The Optuna sampler."""
        return RandomSampler(seed=seed)
