"""Intervals of shares, paired changes and ranking areas at any confidence, also that of many comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilliput.errors import UserError

ANGLES = 200_001  # support points of Student's distribution


class Interval(NamedTuple):
    """An estimate and the interval that holds the true value with the asked confidence."""

    value: float
    low: float
    high: float


def each_of(level: float, comparisons: int) -> float:
    """The confidence of every single one of several intervals that all hold together with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


@lru_cache
def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t above the median: with t = sqrt(d) tan(a) its density is cos(a)^(d - 1)."""
    if degrees > 100_000:
        return NormalDist().inv_cdf(probability)
    angles = np.linspace(0, math.pi / 2, ANGLES)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(2 * probability - 1, mass / mass[-1], angles)
    return math.sqrt(degrees) * math.tan(float(angle))


def share_interval(count: int, total: int, level: float = 0.95) -> Interval:
    """A share with Wilson's interval, which is sound near 0 and 1 and for few samples."""
    if not 0 <= count <= total or total == 0:
        raise UserError(f"{count} of {total} is no share; give a count from 0 to a total above 0")
    z = _normal(level)
    p, bent = count / total, z * z / total
    middle = (p + bent / 2) / (1 + bent)
    half = z / (1 + bent) * math.sqrt(p * (1 - p) / total + bent / (4 * total))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def paired_share(differences: Tensor, level: float = 0.95, bound: float = 1.0) -> Interval:
    """Mean of differences of rights and wrongs (n,) in -bound .. bound, with Bonett and Price's interval.

    Two samples are added, one that got worse and one that got better, so that few samples without a difference do not
    pass as certainty. "Improved inferences for paired proportions", 2012.
    """
    _check(differences, 1)
    d = torch.cat([differences.double(), torch.tensor([-1.0, 1.0], dtype=torch.float64)])
    half = _normal(level) * float(d.var(correction=0)) ** 0.5 / len(d) ** 0.5
    middle = float(d.mean())
    return Interval(float(differences.double().mean()), max(-bound, middle - half), min(bound, middle + half))


def mean_interval(values: Tensor, level: float = 0.95) -> Interval:
    """Mean of values (n,) with Student's interval; infinite for a single one."""
    _check(values, 1)
    v = values.double()
    mean = float(v.mean())
    if len(v) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = student_quantile((1 + level) / 2, len(v) - 1) * float(v.std()) / len(v) ** 0.5
    return Interval(mean, mean - half, mean + half)


def contrast_interval(inside: Tensor, outside: Tensor, level: float = 0.95) -> Interval:
    """Mean of `inside` less the mean of `outside`, differences in -1 .. 1 of two sets of samples.

    Each mean is taken as in `paired_share`; the halves of the two intervals add up as independent errors do.
    """
    a, b = paired_share(inside, level), paired_share(outside, level)
    half = math.hypot(a.high - a.low, b.high - b.low) / 2
    middle = (a.low + a.high - b.low - b.high) / 2
    return Interval(a.value - b.value, middle - half, middle + half)


# --- rankings --------------------------------------------------------------------------------------------------


def ranking_area(members: Tensor, others: Tensor, level: float = 0.95) -> Interval:
    """Probability that a member's score is above another's (the area under the ROC curve), with DeLong's interval."""
    return _delong([_places(members, others)], level)


def area_change(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], level: float = 0.95) -> Interval:
    """Change of that area for the same (members, others) under two scores: DeLong, DeLong and Clarke-Pearson, 1988."""
    return _delong([_places(*after), _places(*before)], level)


def rate_at(members: Tensor, others: Tensor, false_rate: float) -> float:
    """Share of members above the threshold that at most `false_rate` of the others exceed."""
    _check(members, 1)
    _check(others, 1)
    threshold = others.double().sort(descending=True).values[int(false_rate * len(others))]
    return float((members.double() > threshold).double().mean())


def drawn_interval(
    statistic: Callable[[Tensor, Tensor], float], sizes: tuple[int, int], level: float = 0.95, draws: int = 500
) -> Interval:
    """A statistic of two sets of indices, with the central interval of seeded bootstrap draws of both sets."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        return torch.randint(n, (n,), generator=generator)

    found = torch.tensor([statistic(draw(sizes[0]), draw(sizes[1])) for _ in range(draws)], dtype=torch.float64)
    low, high = torch.quantile(found, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(statistic(torch.arange(sizes[0]), torch.arange(sizes[1])), low, high)


def _places(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Share of others below each member, and of members above each other; ties count half."""
    _check(members, 2)
    _check(others, 2)
    return _below(members.double(), others.double()), 1 - _below(others.double(), members.double())


def _below(a: Tensor, b: Tensor) -> Tensor:
    ordered = b.sort().values
    return (torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)) / (2 * len(b))


def _delong(places: list[tuple[Tensor, Tensor]], level: float) -> Interval:
    """The first area, less the second if there is one, from the places of the two sets."""
    parts = [first - (places[1][i] if len(places) > 1 else 0) for i, first in enumerate(places[0])]
    value = float(parts[0].mean())
    half = _normal(level) * sum(float(part.var()) / len(part) for part in parts) ** 0.5
    return Interval(value, value - half, value + half)


def _normal(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"the level of an interval is {level!r}; give a number between 0 and 1")
    return NormalDist().inv_cdf((1 + level) / 2)


def _check(values: Tensor, fewest: int) -> None:
    if values.ndim != 1 or len(values) < fewest:
        raise UserError(
            f"an interval needs {fewest} or more values in one dimension, not the shape {tuple(values.shape)}"
        )
