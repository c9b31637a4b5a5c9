"""What the experiments on initialization share: training by one recipe with a tuned learning rate, and what it gave.

Every contender trains with the rate of RATES that gave it the lowest validation loss on the first seed, by the same
recipe: AdamW, warm-up and cosine, gradient norm 1, the same batches in the same order.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.hooks import evaluating
from lilliput.paper import Row
from lilliput.papers._paired import mean_and_spread
from lilliput.training import Callback, State, train
from lilliput.workload import Workload

RATES = (1e-3, 3e-3, 9e-3)
Make = Callable[[Workload, int], nn.Module]  # workload, seed -> a model to train


@dataclass(eq=False)
class Run:
    """One training: the model, its losses on the test data, and what it took."""

    model: nn.Module
    lr: float
    losses: Tensor  # (samples,): nats per token of a window, or 100 for a picture that is named wrongly
    validation: float  # mean loss
    start_s: float  # to make the model
    seconds: float  # of training
    samples: int  # windows or pictures learned from
    curve: list[tuple[int, float]]  # finished steps, validation loss

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return self.seconds / self.steps

    @property
    def steps(self) -> int:
        return self.curve[-1][0]


class Curve(Callback):
    """Notes the validation loss every so many steps and after the last one."""

    def __init__(self, work: Workload, every: int):
        self.work, self.every = work, every
        self.points: list[tuple[int, float]] = []
        self.seconds: list[float] = []  # of each look

    def on_step(self, state: State) -> None:
        if self.every and state.step % self.every == 0:
            self.note(state)

    def on_end(self, state: State) -> None:
        if not self.points or self.points[-1][0] < state.step:
            self.note(state)

    def note(self, state: State) -> None:
        start = time.perf_counter()
        self.points.append((state.step, float(losses(self.work, state.model, "validation").mean())))
        self.seconds.append(time.perf_counter() - start)


def losses(work: Workload, model: nn.Module, split: str) -> Tensor:
    """(samples,): what the workload's metric counts, such that less is better."""
    with evaluating(model):
        values = work.values(model, split)
    return 100 - values if work.metric.higher_is_better else values


def learned(make: Make, work: Workload, steps: int, lr: float, seed: int, every: int = 0) -> Run:
    """A model made and trained."""
    start = time.perf_counter()
    model = make(work, seed)
    start_s, curve, batches = time.perf_counter() - start, Curve(work, every), list(work.training or ())
    history = train(model, batches, work.loss, steps=steps, lr=lr, clip_norm=1.0, callbacks=[curve], seed=seed)
    seconds = history.seconds - sum(curve.seconds[:-1])  # the last look came after the clock was read
    samples = steps * len(next(iter(batches[0].values())))
    return Run(
        model.eval(), lr, losses(work, model, "test"), curve.points[-1][1], start_s, seconds, samples, curve.points
    )


def learned_tuned(
    make: Make, works: Sequence[Workload], steps: int, seed: int, every: int = 0, rates: Sequence[float] = RATES
) -> list[Run]:
    """One run for each workload, on seeds from `seed`; the learning rate is chosen on the first."""
    tried = [learned(make, works[0], steps, lr, seed, every) for lr in rates]
    best = min(tried, key=lambda run: run.validation)
    return [best, *(learned(make, w, steps, best.lr, seed + i, every) for i, w in enumerate(works[1:], 1))]


def anew(model: nn.Module, seed: int) -> nn.Module:
    """A transformers model of the same config with random weights of its own kind."""
    torch.manual_seed(seed)
    return type(model)(copy.deepcopy(model.config))  # pyright: ignore


def as_many_more(runs: Sequence[Run], steps: int) -> int:
    """Steps for a contender whose start takes no time: those, and as many as the starts of `runs` took."""
    return steps + math.ceil(sum(run.start_s for run in runs) / sum(run.seconds for run in runs) * steps)


def row(name: str, runs: Sequence[Run], unit: str) -> Row:
    """Means of a contender; the spread is over seeds, of a single one the standard error over samples."""
    mean, spread = mean_and_spread([run.losses for run in runs])
    values = {
        unit: mean,
        "start_s": sum(run.start_s for run in runs) / len(runs),
        "training_s": sum(run.seconds for run in runs) / len(runs),
        "samples": sum(run.samples for run in runs) / len(runs),
        "learning_rate": runs[0].lr,
    }
    return Row(name, values, {unit: spread})


def parent_row(name: str, work: Workload, unit: str) -> Row:
    """The workload's own model, which is trained already; the spread is the standard error over samples."""
    mean, spread = mean_and_spread([losses(work, work.model, "test")])
    return Row(name, {unit: mean}, {unit: spread})


def gain(ours: Sequence[Run], other: Sequence[Run]) -> tuple[float, float]:
    """By how much less ours loses, and its standard error: over seeds, of a single one over samples."""
    each = torch.stack([(b.losses - a.losses).double() for a, b in zip(ours, other)])
    over = each.mean(1) if len(each) > 1 else each[0]
    return float(each.mean()), float(over.std() / len(over) ** 0.5)


def times_as_fast(ours: Sequence[Run], other: Sequence[Run]) -> float:
    """How many times sooner ours has the validation loss that the other ends with, starts included; mean over seeds.

    0 where it never gets there.
    """
    return sum(_sooner(a, b) for a, b in zip(ours, other)) / len(ours)


def _sooner(ours: Run, other: Run) -> float:
    reached = next((steps for steps, loss in ours.curve if loss <= other.validation), None)
    return 0.0 if reached is None else (other.start_s + other.seconds) / (ours.start_s + reached * ours.step_s)
