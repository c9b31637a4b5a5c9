"""Step 4: a sampler over joint per-layer settings, on the predictors; starts from the Lagrangian's optima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna

from lilliput.budget import Budget
from lilliput.fitting.predict import Predictor, violation
from lilliput.fitting.space import Genome, Space, greedy
from lilliput.fitting.study import open_study, run_trials
from lilliput.method import find_method

PENALTY = 10.0  # nats for exceeding a limit by 100 %


@dataclass
class Objective:
    """Predicted damage plus a penalty for broken limits; `violation` goes into the trial's attributes."""

    predictor: Predictor
    budget: Budget
    margin: float

    def __call__(self, trial: optuna.Trial) -> float:
        units = self.predictor.space.units
        genome = tuple(trial.suggest_int(unit.name, 0, len(unit.options) - 1) for unit in units)
        excess = violation(self.budget, self.predictor.costs(genome), self.margin)
        trial.set_user_attr("violation", excess)
        return self.predictor.damage(genome) + PENALTY * excess


def search(
    predictor: Predictor,
    budget: Budget,
    *,
    sampler: str = "genecai",
    trials: int = 400,
    seconds: float | None = None,
    seed: int = 0,
    storage: str | Path | None = None,
    name: str = "search",
    margin: float = 0.03,
    seeded: bool = True,
    start: list[Genome] | None = None,
    ray_address: str | None = None,
    on_trial: Callable | None = None,
) -> list[Genome]:
    """Distinct genomes, best predicted first: those within the budget by damage, then the others by violation."""
    space = predictor.space
    settings = find_method(f"search.{sampler}")()
    study = open_study(storage, name, settings.build(seed, 1), ["minimize"])  # type: ignore[attr-defined]
    first = [*(start or []), *(lagrangian_seeds(predictor, budget, margin) if seeded else [])]
    for genome in first:
        study.enqueue_trial({u.name: g for u, g in zip(space.units, genome)}, skip_if_exists=True)
    objective = Objective(predictor, budget, margin)
    run_trials(
        study, objective, trials=trials, seconds=seconds, ray_address=ray_address, on_trial=on_trial, durable=False
    )
    return ranked(predictor, budget, margin, [_genome(space, t) for t in study.get_trials(deepcopy=False) if t.params])


def _genome(space: Space, trial: optuna.trial.FrozenTrial) -> Genome:
    return tuple(int(trial.params[unit.name]) for unit in space.units)


def ranked(predictor: Predictor, budget: Budget, margin: float, genomes: list[Genome]) -> list[Genome]:
    """Genomes without repeats, feasible ones by damage first."""

    def key(genome: Genome) -> tuple[float, float]:
        return violation(budget, predictor.costs(genome), margin), predictor.damage(genome)

    return sorted(dict.fromkeys(genomes), key=key)


def lagrangian_seeds(predictor: Predictor, budget: Budget, margin: float, steps: int = 9) -> list[Genome]:
    """Optima of damage + price x cost, on the way of a bisection to the lowest price that meets the budget.

    The one that meets it at the lowest price comes first, when there is one, with what it leaves of the budget spent.
    """
    space = predictor.space
    limits = {k: v for k, v in budget.limits.items() if k in predictor.costs((0,) * len(space.units))}
    low, high = 1e-6, 1e3
    met: Genome | None = None
    genome: Genome | None = None
    found: list[Genome] = []

    def value(price: float, candidate: Genome) -> float:
        costs = predictor.costs(candidate)
        return predictor.damage(candidate) + price * sum(costs[k] / v for k, v in limits.items())

    for _ in range(steps):
        price = (low * high) ** 0.5
        genome = greedy(space.sizes, partial(value, price), genome)
        feasible = violation(budget, predictor.costs(genome), margin) == 0
        low, high = (low, price) if feasible else (price, high)
        met = genome if feasible else met
        found.append(genome)
    if met is None:
        return list(dict.fromkeys(found))

    def within(candidate: Genome) -> float:
        return predictor.damage(candidate) + PENALTY * violation(budget, predictor.costs(candidate), margin)

    return list(dict.fromkeys([greedy(space.sizes, within, met), met, *found]))
