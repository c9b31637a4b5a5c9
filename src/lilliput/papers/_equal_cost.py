"""Trainings from scratch at equal cost: each contender for as many steps, and again for as many seconds, as the others.

A contender gets a function that trains what it builds, and gives back the model that serves. Its learning rate is the
one of `rates` with the best validation score after a short training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.distill.logits import batches_of
from lilliput.metrics.latency import Comparison
from lilliput.paper import Row
from lilliput.papers._low_rank import interleave, middle, speedup, training_steps, weights
from lilliput.training import Callback, History, train
from lilliput.workload import Workload

STEPS, SECONDS = "steps", "seconds"
Fit = Callable[..., History]  # (model, callbacks=()) trains it
Contender = Callable[[Fit], nn.Module]


@dataclass(frozen=True)
class Effort:
    """How much each contender trains, in both ways, and how many rates are tried."""

    steps: int
    seconds: float
    seeds: int
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tuning: float = 0.3  # share of the steps with which each rate is tried
    rounds: int = 8  # interleaved timings
    test_samples: int = 1000
    training_samples: int = 6400


@dataclass
class Found:
    """What was measured of one contender; per seed the test values of all samples, at equal steps and equal seconds."""

    rate: float
    values: dict[str, list[Tensor]] = field(default_factory=lambda: {STEPS: [], SECONDS: []})
    facts: dict[str, list[float]] = field(default_factory=dict)  # measured quantity -> one figure a seed

    def note(self, **facts: float) -> None:
        for name, value in facts.items():
            self.facts.setdefault(name, []).append(value)

    def row(self, name: str, metric: str) -> Row:
        """Means over the seeds, with the standard deviation over them."""
        scored = {f"{metric}_at_equal_{way}": [float(v.mean()) for v in found] for way, found in self.values.items()}
        measured = {name: found for name, found in (scored | self.facts).items() if found}
        spread = {k: statistics.stdev(v) for k, v in measured.items() if len(v) > 1}
        return Row(name, {k: statistics.mean(v) for k, v in measured.items()} | {"learning_rate": self.rate}, spread)


def plain(build: Callable[[], nn.Module]) -> Contender:
    """A model that serves as it was trained."""

    def contender(fit: Fit) -> nn.Module:
        model = build()
        fit(model)
        return model

    return contender


def compare(
    contenders: Mapping[str, Contender], work_of: Callable[[int], Workload], effort: Effort, seed: int
) -> tuple[dict[str, Found], dict[str, nn.Module]]:
    """Every contender on every seed in both ways; and the models of the first seed after equally many steps.

    Rates are tuned on data drawn by another seed. Who trains first changes from seed to seed, since machines drift.
    """
    work = work_of(seed + effort.seeds)
    found = {name: Found(tuned_rate(one, work, effort, seed)) for name, one in contenders.items()}
    models: dict[str, nn.Module] = {}
    names = list(contenders)
    for i in range(effort.seeds):
        work = work_of(seed + i)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for way, limits in ((STEPS, (effort.steps, None)), (SECONDS, (None, effort.seconds))):
                fitting = Fitting(work, found[name].rate, seed + i, *limits)
                model = fitting.run(contenders[name])
                measure(found[name], way, fitting.history, model, work)
                models.setdefault(name, model)
    return found, models


def measure(found: Found, way: str, history: History, model: nn.Module, work: Workload) -> None:
    """Test values of a trained model, and what the other way to be equal would count."""
    found.values[way].append(work.values(model, "test"))
    if way == STEPS:
        found.note(weights=float(weights(model)), seconds_of_equal_steps=history.seconds)
    else:
        found.note(steps_in_equal_seconds=float(history.steps))


class Fitting:
    """One training of a contender: `run` hands it the function that trains."""

    def __init__(self, work: Workload, lr: float, seed: int, steps: int | None = None, seconds: float | None = None):
        self.work, self.history, self.seed = work, History(), seed
        self.train = partial(train, lr=lr, clip_norm=1.0, seed=seed, steps=steps, seconds=seconds)

    def run(self, contender: Contender) -> nn.Module:
        torch.manual_seed(self.seed)
        return contender(self.fit).eval()

    def fit(self, model: nn.Module, callbacks: Iterable[Callback] = ()) -> History:
        self.history = self.train(model, batches_of(self.work), self.work.loss, callbacks=callbacks)
        return self.history


def tuned_rate(contender: Contender, work: Workload, effort: Effort, seed: int) -> float:
    """The rate with the best validation score after a share of the steps; one that diverges is the worst."""
    sign = 1 if work.metric.higher_is_better else -1

    def score(rate: float) -> float:
        try:
            model = Fitting(work, rate, seed, steps=max(1, round(effort.tuning * effort.steps))).run(contender)
            return sign * float(work.values(model).mean())
        except UserError:  # of a loss that is not finite
            return float("-inf")

    return max(effort.rates, key=score)


def margin(found: Mapping[str, Found], ours: str, other: str, way: str, higher_is_better: bool) -> tuple[float, float]:
    """Mean over seeds and samples by which ours is better, and its standard error: the larger of those
    over seeds and over samples."""
    sign = 1 if higher_is_better else -1
    gains = [sign * (a - b).double() for a, b in zip(found[ours].values[way], found[other].values[way])]
    means = [float(gain.mean()) for gain in gains]
    by_sample = torch.stack(gains).mean(0)
    over_samples = float(by_sample.std()) / len(by_sample) ** 0.5
    over_seeds = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return statistics.mean(means), max(over_samples, over_seeds)


def faster_steps(
    found: Mapping[str, Found], models: Mapping[str, nn.Module], work: Workload, ours: str, other: str, rounds: int
) -> Comparison:
    """How many times as fast a training step of ours is as the other's; milliseconds of both are noted."""
    taken_ms = interleave({name: training_steps(models[name], work) for name in (ours, other)}, rounds)
    for name, taken in taken_ms.items():
        found[name].note(two_training_steps_ms=middle(taken)[0])
    return speedup(taken_ms, ours, other)


def times(comparison: Comparison) -> str:
    """A ratio of speeds with its interval."""
    return f"{comparison.ratio:.2f}x [{comparison.low:.2f}, {comparison.high:.2f}] as fast"
