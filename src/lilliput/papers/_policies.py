"""What the two experiments on policy search share: a compressor with a knob per layer and family, scored, cached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
import torch
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from torch import Tensor, nn

from lilliput.hooks import attached, renewing_norms
from lilliput.methods.factorize.tucker import Tucker
from lilliput.methods.prune.channels import Channels
from lilliput.training import train
from lilliput.workload import Batch, Workload
from lilliput.zoo import images, nets
from lilliput.zoo.images import Pictures

PRUNED = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # share of a block's inner channels that is removed
KEPT = (1.0, 0.75, 0.5, 0.35, 0.25)  # share of a convolution's weights that Tucker factors keep; 1: not factored

Genome = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One compressed network before any fine-tuning; MACs and weights are shares of the original's."""

    genome: Genome
    accuracy: float  # percent, on the pictures that the search may look at
    macs: float
    size: float


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    evaluations: int  # of each contender
    seeds: int
    search_pictures: int  # of validation
    held_pictures: int  # of validation, others
    test_pictures: int
    steps: int  # of fine-tuning, 64 pictures each


class Problem:
    """Which rate and rank for every layer of a residual network; evaluations are cached by genome."""

    def __init__(self, model: nn.Module, work: Workload, held: Sequence[Batch]):
        self.model, self.work, self.held = model.eval(), work, held
        convs = list(Tucker().targets(model))
        self.pruned = [n for n in convs if n.endswith("conv1")]  # channels inside a block: coupled with nothing else
        self.factored = [n for n in convs if n.endswith(("conv1", "conv2"))]
        self.levels = [len(PRUNED)] * len(self.pruned) + [len(KEPT)] * len(self.factored)
        self.space = {f"knob{i}": IntDistribution(0, n - 1) for i, n in enumerate(self.levels)}
        self._dense = costs(model, work.example["input"])
        self._points: dict[Genome, Point] = {}

    def build(self, genome: Genome) -> nn.Module:
        """The compressed network with its batch-norm statistics taken anew on the calibration pictures."""
        rates = dict(zip(self.pruned, (PRUNED[g] for g in genome[: len(self.pruned)])))
        ranks = dict(zip(self.factored, (KEPT[g] for g in genome[len(self.pruned) :])))
        model = copy.deepcopy(self.model)
        if layers := {n: {"ratio": r} for n, r in rates.items() if r > 0}:
            model = Channels().apply_(model, self.work, Channels().resolve(model, layers))
        left = set(Tucker().targets(model))  # a convolution with hardly any channels left cannot be factored
        if layers := {n: {"ratio": r} for n, r in ranks.items() if r < 1 and n in left}:
            model = Tucker().apply_(model, self.work, Tucker().resolve(model, layers))
        renew_norms_(model, self.work)
        return model

    def evaluate(self, genome: Genome) -> Point:
        """Accuracy without fine-tuning, and costs."""
        if genome not in self._points:
            model = self.build(genome)
            macs, size = costs(model, self.work.example["input"])
            accuracy = float(self.work.values(model).mean())
            self._points[genome] = Point(genome, accuracy, macs / self._dense[0], size / self._dense[1])
        return self._points[genome]

    def held_accuracy(self, genome: Genome) -> float:
        """Percent on validation pictures that no search saw."""
        model = self.build(genome)  # traces with gradients, so it stays outside the inference mode
        with torch.inference_mode():
            right = [(model(b["input"]).argmax(-1) == b["label"]).float() for b in self.held]
        return 100 * float(torch.cat(right).mean())

    def tuned_accuracy(self, genome: Genome, steps: int, seed: int) -> float:
        """Percent on the test pictures after fine-tuning, the same for every contender."""
        model = self.build(genome)
        train(model, list(self.work.training or ()), self.work.loss, steps=steps, lr=1e-3, clip_norm=1.0, seed=seed)
        return float(self.work.values(model, "test").mean())

    def uniform(self, rate: float, rank: float) -> Genome:
        """The genome with one strength 0..1 of pruning and one of factoring everywhere."""
        return (round(rate * (len(PRUNED) - 1)),) * len(self.pruned) + (round(rank * (len(KEPT) - 1)),) * len(
            self.factored
        )

    def genome_of(self, trial: optuna.Trial) -> Genome:
        """The genome that a trial proposes."""
        return tuple(trial.suggest_int(name, d.low, d.high) for name, d in self.space.items())


def fashion_problem(seed: int, effort: Effort) -> Problem:
    """`resnet-small` on Fashion-MNIST: the seed draws the training pictures; all other splits are fixed, disjoint."""
    splits = images.fashion_mnist()
    order = torch.randperm(len(splits["training"]), generator=torch.Generator().manual_seed(seed))
    training, validation = _part(splits["training"], order[: effort.steps * 64]), splits["validation"]
    search = validation.first(effort.search_pictures)
    held = _part(validation, torch.arange(len(validation))[-effort.held_pictures :])
    parts = (splits["calibration"].first(200), search, splits["test"].first(effort.test_pictures))
    batches = [list(part.batches(200)) for part in parts]
    model = nets.load("resnet-small")
    work = Workload.classifier(model, *batches, training=list(training.batches(64)))
    return Problem(model, work, list(held.batches(200)))


def _part(pictures: Pictures, index: Tensor) -> Pictures:
    return Pictures(pictures.pixels[index], pictures.labels[index], pictures.prepare)


def renew_norms_(model: nn.Module, work: Workload) -> None:
    """Batch-norm means and variances as they are on the calibration pictures."""
    with renewing_norms(model):
        for batch in work.calibration:
            work.forward(model, batch)


@torch.inference_mode()
def costs(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """(multiply-adds of convolutions and linear layers for one picture, weights)."""
    total = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += weight.numel() * (output[0].numel() / output.shape[1])

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in layers]
    with attached(hooks):
        model(example[:1])
    return total, float(sum(p.numel() for p in model.parameters()))


def sampled(
    problem: Problem,
    sampler: optuna.samplers.BaseSampler,
    effort: Effort,
    losses: Callable[[Point], Sequence[float]],
) -> list[Point]:
    """The points that an Optuna sampler tries, in order."""
    points: list[Point] = []

    def objective(trial: optuna.Trial) -> Sequence[float]:
        points.append(problem.evaluate(problem.genome_of(trial)))
        return losses(points[-1])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    count = len(losses(Point((), 0.0, 1.0, 1.0)))
    study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * count, sampler=sampler)
    study.optimize(objective, n_trials=effort.evaluations)
    return points


def hyper_volume(pairs: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The share of the rectangle from (0, 0) to `reference` that the points (both smaller is better) dominate."""
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(set(pairs)):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area / (reference[0] * reference[1])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; 0 when there is one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
