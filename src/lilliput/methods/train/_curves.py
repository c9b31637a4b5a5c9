"""Curves of accuracy over training and over the number of tries, fitted to a few points, and what follows from them.

Over training operations B: A(B) = a (1 - exp(-b B)) + c. Over tries K: a sigmoid of log K below a ceiling, or straight
lines between the measured points. All fits are least squares; where a parameter enters nonlinearly it is searched on a
grid, so that a handful of noisy points always gives an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.errors import UserError

RATES = torch.logspace(-2, 3, 201, dtype=torch.float64)  # b, for B from 0 to its last point scaled to 0..1
CEILINGS = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)  # of the way from the best point to 1
TIED = 1e-6  # squared errors that differ by less are equal
REACHED = 1e-3  # below the target still reaches it
EDGE = 1e-4  # accuracies are kept this far from 0 and from the ceiling before their log odds are taken


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """(questions, n) of right or wrong -> (questions,): chance that one of k tries is right, 1 - C(n-c, k) / C(n, k).

    Unbiased over the n samples. Raises UserError when k is not from 1 to n.
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs at least {k} samples of a question and k from 1; there are {n}")
    wrong = n - right.double().sum(1)
    ways = [(wrong - i).clamp_min(0) / (n - i) for i in range(k)]
    return 1 - torch.stack(ways).prod(0)


def rising(values: Sequence[float]) -> list[int]:
    """Indices of the points that are not below any before them."""
    best, kept = -math.inf, []
    for i, value in enumerate(values):
        if value >= best:
            best = value
            kept.append(i)
    return kept


@dataclass(frozen=True)
class Saturating:
    """A(x) = a (1 - exp(-b x)) + c with a, b >= 0."""

    a: float
    b: float
    c: float

    def __call__(self, x: float) -> float:
        return self.a * (1 - math.exp(-self.b * x)) + self.c


def fit_saturating(x: Sequence[float], y: Sequence[float]) -> Saturating:
    """The least-squares curve through points (x, y), x >= 0. A rise that fits nothing becomes the mean.

    Raises UserError for fewer than three points, which any curve of this kind goes through.
    """
    if len(x) != len(y) or len(x) < 3:
        raise UserError(f"{len(x)} and {len(y)} numbers were given; a saturating curve needs at least 3 points")
    xs, ys = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    scale = float(xs.max()) or 1.0
    basis = 1 - torch.exp(-RATES[:, None] * xs / scale)  # (rates, points)
    centred, target = basis - basis.mean(1, keepdim=True), ys - ys.mean()
    a = ((centred * target).sum(1) / centred.square().sum(1).clamp_min(1e-30)).clamp_min(0)
    errors = (a[:, None] * centred - target).square().sum(1)
    best = int(errors.argmin())
    c = ys.mean() - a[best] * basis[best].mean()
    return Saturating(float(a[best]), float(RATES[best]) / scale, float(c))


# --- over tries ------------------------------------------------------------------------------------------------

Curve = Callable[[float], float]  # tries -> accuracy


@dataclass(frozen=True)
class Sigmoid:
    """P(K) = ceiling / (1 + exp(-(slope ln K + offset)))."""

    ceiling: float
    slope: float
    offset: float

    def __call__(self, tries: float) -> float:
        return self.ceiling / (1 + math.exp(-(self.slope * math.log(tries) + self.offset)))


def fit_sigmoid(tries: Sequence[int], accuracies: Sequence[float]) -> Sigmoid:
    """The sigmoid of log K with the least squared error, its log odds a straight line, slope >= 0.

    Of ceilings that fit as well the highest is taken, which promises least between the points.
    """
    _check_tries(tries, accuracies)
    k, y = torch.tensor(tries, dtype=torch.float64).log(), torch.tensor(accuracies, dtype=torch.float64)
    ceilings = y.max() + (1 - y.max()) * CEILINGS
    share = (y / ceilings.clamp_min(EDGE)[:, None]).clamp(EDGE, 1 - EDGE)  # (ceilings, points)
    odds, centred = torch.logit(share), k - k.mean()
    slope = ((odds * centred).sum(1) / centred.square().sum().clamp_min(1e-30)).clamp_min(0)
    offset = odds.mean(1) - slope * k.mean()
    errors = (ceilings[:, None] * torch.sigmoid(slope[:, None] * k + offset[:, None]) - y).square().sum(1)
    best = int((errors <= 1.01 * errors.min() + TIED).nonzero()[-1])
    return Sigmoid(float(ceilings[best]), float(slope[best]), float(offset[best]))


def fit_lines(tries: Sequence[int], accuracies: Sequence[float]) -> Curve:
    """Straight lines over log K between the points, which are made rising; flat outside of them."""
    _check_tries(tries, accuracies)
    points = sorted(zip(map(math.log, tries), accuracies))
    logs, heights = [p[0] for p in points], [max(h for _, h in points[: i + 1]) for i in range(len(points))]

    def curve(tries: float) -> float:
        x = math.log(tries)
        right = next((i for i, at in enumerate(logs) if at >= x), len(logs) - 1)
        if right == 0 or x >= logs[-1]:
            return heights[right]
        share = (x - logs[right - 1]) / (logs[right] - logs[right - 1])
        return heights[right - 1] + share * (heights[right] - heights[right - 1])

    return curve


def _check_tries(tries: Sequence[int], accuracies: Sequence[float]) -> None:
    if len(tries) != len(accuracies) or len(tries) < 2 or min(tries) < 1:
        raise UserError(f"tries {list(tries)} with {len(accuracies)} accuracies; give at least two numbers from 1")


CURVES: dict[str, Callable[[Sequence[int], Sequence[float]], Curve]] = {"sigmoid": fit_sigmoid, "lines": fit_lines}


def fewest_tries(curve: Curve, target: float, most: int) -> int | None:
    """The smallest number of tries from 1 to `most` whose accuracy reaches the target, None when none does."""
    return next((k for k in range(1, most + 1) if curve(k) >= target - REACHED), None)


# --- what it costs ---------------------------------------------------------------------------------------------


def training_operations(parameters: int, tokens: float) -> float:
    """6 N D: multiplications and additions of training N parameters on D tokens."""
    return 6.0 * parameters * tokens


def breakeven_queries(
    parameters: int, tokens_saved: float, tokens_per_answer: float, tries: int, verifier_operations: float = 0.0
) -> float:
    """Queries after which the further tries have used up what the training saved: 6 N D' / ((K - 1) 2 N L + K V).

    `verifier_operations` V are those of judging one try. Infinite when a query costs no more than before.
    """
    extra = 2.0 * parameters * tokens_per_answer * (tries - 1) + (verifier_operations * tries if tries > 1 else 0.0)
    return training_operations(parameters, tokens_saved) / extra if extra > 0 else math.inf
