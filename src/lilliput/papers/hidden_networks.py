"""Networks hidden in random weights: does choosing which of them to keep do what training them does?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lilliput.edits import set_module
from lilliput.methods.distill.logits import batches_of
from lilliput.methods.prune._hidden import hidden_layer
from lilliput.methods.prune.hidden_networks import HiddenNetworks
from lilliput.methods.prune.magnitude import Magnitude
from lilliput.methods.quantize.binary import Binary
from lilliput.metrics.memory import weight_bytes
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._binary_nets import Trained
from lilliput.papers._healed import clearly, close, said
from lilliput.papers._low_rank import Effort, pictures_work
from lilliput.papers._paired import points_over
from lilliput.training import train
from lilliput.workload import Workload

paper = Paper(
    title="What's Hidden in a Randomly Weighted Neural Network?",
    authors="Vivek Ramanujan, Mitchell Wortsman, Aniruddha Kembhavi, Ali Farhadi, Mohammad Rastegari",
    year=2020,
    arxiv="1911.13299",
    claim="A wide enough network of random weights holds a subnetwork that is as accurate as a trained narrower one; "
    "edge-popup finds it by scores, without ever changing a weight.",
    methods=("prune.hidden_networks",),
)

DENSE, HIDDEN, WIDE = "trained", "hidden in random weights", "hidden in twice the width"
RANDOM, PRUNED = "half of random weights, norms trained", "trained, half pruned by magnitude"
BINARY = "binary weights (BWN), twice the width"
KEPT = 0.5
TOLERATED_POINTS = 1.0  # that count as matching, two standard errors included
Fit = Callable[[nn.Module, Workload, int, float, int], nn.Module]  # network, data, steps, rate, seed


def network(width: int) -> nn.Sequential:
    """Conv-4 for 28x28: convolutions of 1, 2, 2 and 4 times `width` filters, each with a batch norm and a ReLU."""

    def block(inputs: int, outputs: int, stride: int, pool: bool) -> list[nn.Module]:
        parts = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return [*parts, nn.MaxPool2d(2)] if pool else parts

    w = width
    convolutions = [*block(1, w, 2, False), *block(w, 2 * w, 1, True), *block(2 * w, 2 * w, 1, False)]
    return nn.Sequential(*convolutions, *block(2 * w, 4 * w, 1, True), nn.Flatten(), nn.Linear(36 * w, 10, bias=False))


def fit_all(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> nn.Module:
    """Train everything that can be trained."""
    train(model, batches_of(work), work.loss, steps=steps, lr=rate, seed=seed)
    return model


def fit_norms(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> nn.Module:
    """Random weights of which a random half stays; scale and shift of the norms learn."""
    for i, name in enumerate(list(HiddenNetworks().targets(model))):
        layer = hidden_layer(model.get_submodule(name), KEPT, 1000 * seed + i)
        layer.settle_()
        set_module(model, name, layer)
    return fit_all(model, work, steps, rate, seed)


def fit_hidden(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> nn.Module:
    """Edge-popup."""
    return HiddenNetworks(kept=KEPT, steps=steps, lr=rate, seed=seed).apply(model, work)


def fit_pruned(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> nn.Module:
    """Weights of growing sparsity."""
    return Magnitude(sparsity=1 - KEPT, steps=steps, lr=rate).apply(model, work)


def fit_binary(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> nn.Module:
    """A bit per weight that is learned, too: its sign."""
    return Binary(activations="real", ends=True, steps=steps, lr=rate, seed=seed).apply(model, work)


@dataclass(frozen=True)
class Contender:
    width: int
    rate: float
    fit: Fit


# Of 3 to 5 rates about a factor of 3 apart those with the best accuracy on validation pictures, after 400 steps.
CONTENDERS = {
    DENSE: Contender(16, 0.03, fit_all),
    HIDDEN: Contender(16, 2.0, fit_hidden),
    WIDE: Contender(32, 2.0, fit_hidden),
    RANDOM: Contender(16, 0.1, fit_norms),
    PRUNED: Contender(16, 0.03, fit_pruned),
    BINARY: Contender(32, 3e-3, fit_binary),
}
EFFORT = Effort(steps=400, test_pictures=4000, rounds=0, seeds=3)


@dataclass
class Fitted(Trained):
    """Accuracies and the last network, with what it took."""

    seconds: list[float] = field(default_factory=list)


def experiment(seed: int = 0, full: bool = False, contenders: Mapping[str, Contender] = CONTENDERS) -> Evidence:
    """Conv-4 on Fashion-MNIST, every contender for equally many steps on the same pictures.

    Holds when the subnetwork of twice the width, two standard errors over seeds included, is not TOLERATED_POINTS below
    the trained network, and above a random half of random weights by more than two standard errors. `full` trains ten
    times as long, on five seeds.
    """
    effort = Effort(steps=4000, test_pictures=10_000, rounds=0, seeds=5) if full else EFFORT
    return evidence({name: fitted(c, seed, effort) for name, c in contenders.items()}, effort, seed)


def fitted(contender: Contender, seed: int, effort: Effort) -> Fitted:
    """Train one contender once for each seed, which sets first weights, pictures and their order."""
    found = Fitted([], nn.Module())
    for s in range(seed, seed + effort.seeds):
        torch.manual_seed(s)
        model = network(contender.width)
        work = pictures_work(model, s, effort)
        start = perf_counter()
        found.network = contender.fit(model, work, effort.steps, contender.rate, s).eval()
        found.seconds.append(perf_counter() - start)
        found.accuracies.append(work.score(found.network, "test").value)
    return found


def stored_bytes(model: nn.Module) -> float:
    """Bytes of all tensors; of float layers with zeros those left, and a bit per weight that says which."""
    total = float(weight_bytes(model))
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, nn.Conv2d | nn.Linear) and (zeros := int((weight == 0).sum())):
            total += weight.numel() / 8 - 4 * zeros
    return total


def evidence(found: Mapping[str, Fitted], effort: Effort, seed: int) -> Evidence:
    """Rows and verdict of what was trained."""
    gains = {name: points_over(found[WIDE], found[name]) for name in (DENSE, RANDOM, PRUNED, BINARY)}
    gains[HIDDEN] = points_over(found[HIDDEN], found[DENSE])
    points = {name: said(gain, 1) for name, gain in gains.items()}
    size = stored_bytes(found[WIDE].network) / stored_bytes(found[DENSE].network)
    return Evidence(
        setup=f"Conv-4 (16, 32, 32, 64 filters, or twice as many), Fashion-MNIST, {effort.steps} steps of "
        f"{effort.batch_size} pictures, {effort.test_pictures} test pictures, seeds {seed} to "
        f"{seed + effort.seeds - 1}, {KEPT:.0%} of the weights kept; {torch.get_num_threads()} threads, CPU",
        rows=[row(name, one) for name, one in found.items()],
        holds=judge(gains[DENSE], gains[RANDOM]),
        figure=f"hidden in twice the width {points[DENSE]} points from the trained network at {size:.2f} of its bytes "
        f"(in the same width {points[HIDDEN]}); {points[RANDOM]} over a random half, {points[PRUNED]} over half "
        f"pruned, {points[BINARY]} over binary weights of the same width",
        limits="A small network, pictures and training where the paper has 100 epochs of CIFAR-10 and ImageNet: scores "
        "learn slower than weights. Rates were chosen for each contender at this length. A step of twice the width "
        "takes longer than one of the trained network, and bits are unpacked at each pass: nothing runs faster.",
    )


def row(name: str, one: Fitted) -> Row:
    """Accuracy with its spread over seeds, stored bytes, and seconds of training."""
    return one.row(name, {"network_bytes": stored_bytes(one.network), "training_seconds": fmean(one.seconds)})


def judge(over_trained: tuple[float, float], over_random: tuple[float, float]) -> bool:
    """The rule of `experiment`; each is (points of accuracy by which ours is better, standard error)."""
    return close(over_trained, TOLERATED_POINTS) and clearly(over_random)
