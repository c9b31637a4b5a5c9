"""The search space of a fit: units (layers that share a decision), the options of each, and what a choice would cost.

A genome is one option index per unit, in the order of `Space.units`. Every unit's option 0 leaves its layers alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from lilliput.method import STAGES, Method
from lilliput.plan import Plan, Step

Genome = tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a unit: a method with its settings, or nothing."""

    label: str
    method: Method | None = None


@dataclass(frozen=True)
class Unit:
    """Layers that take the same option. `part` is the column of the report's heat map, `block` its row."""

    name: str
    targets: tuple[str, ...]
    options: tuple[Option, ...]
    block: int | None = None
    part: str = ""


@dataclass
class Space(ABC):
    """Units with the damage of each option (increase of the loss, nats), and a model of the costs."""

    units: list[Unit]
    damage: list[np.ndarray] = field(default_factory=list)  # per unit, one number per option
    rivals: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> uniform setting that a search must beat
    timed: dict[Genome, dict[str, float]] = field(default_factory=dict)  # measured while the space was made

    @abstractmethod
    def cost_parts(self, genome: Genome) -> dict[str, dict[str, float]]:
        """Quantity -> part -> what it adds, of all budget quantities but `drop`; parts are corrected one by one."""

    def learn(self, measured: Sequence[tuple[Genome, Mapping[str, float]]]) -> None:  # noqa: B027
        """Make the model of the costs anew from everything measured, where a space can."""

    def tried(self, genome: Genome) -> tuple[nn.Module, float]:
        """The genome built without healing, and its damage as a quick judge sees it; for spaces that are healed."""
        raise NotImplementedError

    def costs(self, genome: Genome) -> dict[str, float]:
        """Predicted budget quantities but `drop`, before correction."""
        return {key: sum(parts.values()) for key, parts in self.cost_parts(genome).items()}

    def predicted_damage(self, genome: Genome) -> dict[str, float]:
        """Predicted increase of the loss by method family, before correction."""
        total: dict[str, float] = {}
        for unit, damage, choice in zip(self.units, self.damage, genome):
            method = unit.options[choice].method
            if method is not None:
                family = method.name().split(".")[0]
                total[family] = total.get(family, 0.0) + float(damage[choice])
        return total

    def plan(self, genome: Genome) -> Plan:
        """The genome as a legal plan in the order of stages; every method stands once, with settings per layer."""
        steps: dict[type[Method], tuple[Method, dict[str, dict[str, Any]]]] = {}
        for unit, choice in zip(self.units, genome):
            method = unit.options[choice].method
            if method is not None:
                base, layers = steps.setdefault(type(method), (method, {}))
                layers.update({target: _difference(method, base) for target in unit.targets})
        ordered = sorted(steps.values(), key=lambda step: STAGES.index(step[0].facts.stage))
        return Plan([Step(method, layers) for method, layers in ordered])

    def labels(self, genome: Genome) -> dict[str, str]:
        """Unit name -> what happens to it."""
        return {unit.name: unit.options[choice].label for unit, choice in zip(self.units, genome)}

    def heat(self, genome: Genome) -> list[dict[str, Any]]:
        """Block, part and setting of every unit, for the report's map."""
        return [
            {"unit": unit.name, "block": unit.block, "part": unit.part, "setting": unit.options[choice].label,
             "option": choice, "options": len(unit.options)}
            for unit, choice in zip(self.units, genome)
        ]  # fmt: skip

    def uniform(self, wanted: Mapping[str, str]) -> Genome:
        """The genome that gives each unit the option that `wanted[part]` (or `wanted["*"]`) names, where it has it."""
        return tuple(_index(unit, wanted.get(unit.part, wanted.get("*", ""))) for unit in self.units)

    @property
    def sizes(self) -> list[int]:
        return [len(unit.options) for unit in self.units]


def _difference(method: Method, base: Method) -> dict[str, Any]:
    """Settings of `method` that differ from those of `base`."""
    fields = vars(method)
    return {name: value for name, value in fields.items() if value != vars(base)[name]}


def _index(unit: Unit, label: str) -> int:
    return next((i for i, option in enumerate(unit.options) if option.label == label), 0)


def greedy(sizes: Sequence[int], value: Callable[[Genome], float], start: Sequence[int] | None = None) -> Genome:
    """One sweep of coordinate descent on `value`; for sums over units it finds the optimum."""
    genome = list(start or [0] * len(sizes))
    for i, size in enumerate(sizes):
        values = [value((*genome[:i], option, *genome[i + 1 :])) for option in range(size)]
        genome[i] = int(np.argmin(values))
    return tuple(genome)
