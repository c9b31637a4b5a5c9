"""What experiments at equal seconds share: trainings that end by the clock, rates tuned for each contender, rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.paper import Row
from lilliput.training import cosine
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

WARM_UP = 0.2  # of the time: every contender is trained for so long before anything counts
TUNING_SEED = 1000  # is added to the seed: pictures, weights and order of a tuning run are not those of the figures


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    seconds: float  # of a training, everything it needs included
    seeds: int
    pictures: int  # to train on
    test_pictures: int
    rates: tuple[float, ...]  # of learning that are tried for each contender
    validation_pictures: int = 2000


@dataclass
class Trainee:
    """A training that is ready to begin: `draw(done)` gives the next batch after a share, `step(batch)` learns."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    draw: Callable[[float], tuple[Tensor, ...]]
    step: Callable[[tuple[Tensor, ...]], object]
    facts: Callable[[], dict[str, float]] = dict  # figures of its own, at the end


Begin = Callable[[TensorDataset, int, float], Trainee]  # training pictures, seed, learning rate


@dataclass
class Found:
    """What was measured of one contender: per seed the percent right, and figures."""

    rate: float
    accuracies: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Means and standard deviations over the seeds."""
        found = {"accuracy_percent": self.accuracies, **self.figures}
        values = {k: statistics.fmean(v) for k, v in found.items()} | {"learning_rate": self.rate}
        return Row(name, values, {k: statistics.stdev(v) for k, v in found.items() if len(v) > 1})


def training_set(seed: int, count: int) -> TensorDataset:
    """Pictures (n, 1, 28, 28), labels and indices of Fashion-MNIST's training split, drawn by the seed."""
    split = images.fashion_mnist()["training"]
    pick = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return TensorDataset(split.prepare(split.pixels[pick]), split.labels[pick], torch.arange(len(pick)))


def train_for(begin: Callable[[], Trainee], seconds: float) -> tuple[Trainee, dict[str, float]]:
    """Begin and train until the time is used up, the rate following a cosine of it; the trainee, steps and samples."""
    start, rise = time.perf_counter(), cosine()
    trainee = begin()
    rates = [group["lr"] for group in trainee.optimizer.param_groups]
    trainee.model.train()
    steps = samples = 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        for group, rate in zip(trainee.optimizer.param_groups, rates):
            group["lr"] = rate * rise(done)
        batch = trainee.draw(done)
        trainee.step(batch)
        steps, samples = steps + 1, samples + len(batch[0])
    return trainee, {"steps": float(steps), "samples": float(samples), **trainee.facts()}


def endless(batches: Iterable) -> Iterator:
    """Epoch after epoch."""
    while True:
        yield from batches


@torch.no_grad()
def accuracy_percent(model: nn.Module, pictures: Pictures, at: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """Share of right answers, in percent; `at` changes the pictures before the model sees them."""
    with evaluating(model):
        right = [(model(at(b["input"])).argmax(1) == b["label"]).sum() for b in pictures.batches(256)]
    return 100 * float(torch.stack(right).sum()) / len(pictures)


def compare(
    contenders: Mapping[str, Begin],
    effort: Effort,
    seed: int,
    also: Callable[[nn.Module, Pictures], dict[str, float]] = lambda model, test: {},
) -> dict[str, Found]:
    """Every contender with its best rate, in turn for each seed; `also` measures more on the test pictures.

    The rate is that of the highest accuracy on validation pictures after a run of the same length with other training
    pictures and weights; one at which the training breaks down is out. What torch prepares once for every shape of a
    product is prepared before.
    """
    splits = images.fashion_mnist()
    validation, test = (
        splits["validation"].first(effort.validation_pictures),
        splits["test"].first(effort.test_pictures),
    )

    def run(begin: Begin, s: int, rate: float, share: float = 1.0) -> tuple[nn.Module, dict[str, float]]:
        data = training_set(s, effort.pictures)
        trainee, figures = train_for(lambda: begin(data, s, rate), effort.seconds * share)
        return trainee.model, figures

    def score(begin: Begin, rate: float) -> float:
        try:
            return accuracy_percent(run(begin, seed + TUNING_SEED, rate)[0], validation)
        except UserError:  # the loss or the gradient is not finite any more
            return -1.0

    found = {}
    for begin in contenders.values():
        run(begin, seed + TUNING_SEED, min(effort.rates), WARM_UP)
    for name, begin in contenders.items():
        scores = {rate: score(begin, rate) for rate in effort.rates}
        found[name] = Found(max(scores, key=lambda rate: scores[rate]))
    for s in range(seed, seed + effort.seeds):
        for name, begin in contenders.items():
            model, figures = run(begin, s, found[name].rate)
            found[name].accuracies.append(accuracy_percent(model, test))
            for key, value in (figures | also(model, test)).items():
                found[name].figures.setdefault(key, []).append(value)
    return found


def setup(what: str, effort: Effort, seed: int) -> str:
    """What was run, in words."""
    return (
        f"{what}; {effort.pictures} pictures of Fashion-MNIST, {effort.seconds:g} s of training for every contender, "
        f"all of its work included, rate chosen for each from {', '.join(f'{r:g}' for r in effort.rates)} on other "
        f"training pictures; {effort.test_pictures} test pictures, seeds {seed} to {seed + effort.seeds - 1}, "
        f"{torch.get_num_threads()} threads, CPU"
    )
