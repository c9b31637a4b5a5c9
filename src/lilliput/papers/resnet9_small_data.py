"""ResNet-9 on few pictures and by the clock: which parts of the winning recipe pay for the time they take?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.edits import set_module
from lilliput.methods.layers.patch_whitening import PatchWhitening
from lilliput.methods.train.gradient_centralization import GradientCentralization
from lilliput.methods.train.meta_step import MetaOptimizer, MetaStep, halves
from lilliput.methods.train.sam import Sam, SamOptimizer
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_seconds import (
    Begin,
    Effort,
    Trainee,
    compare,
    endless,
    setup,
)
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._paired import points_over
from lilliput.zoo.train import augment

paper = Paper(
    title="Improving ResNet-9 Generalization Trained on Small Datasets",
    authors="Omar Mohamed Awad, Habib Hajimolahoseini, Michael Lim, Gurpreet Gosal, Walid Ahmed, Yang Liu, Gordon Deng",
    year=2023,
    arxiv="2309.03965",
    claim="Sharpness-aware minimisation, label smoothing, gradient centralization, input patch whitening and "
    "meta-learning based training each improve a ResNet-9 that has 5,000 pictures and ten minutes, and add up.",
    methods=("train.sam", "train.gradient_centralization", "train.meta_step", "layers.patch_whitening"),
)

ALL, PLAIN = "whole recipe", "plain"
BATCH = 64
MOMENTUM, DECAY = 0.9, 5e-4
SMOOTHING = 0.1


@dataclass(frozen=True)
class Switches:
    """Parts of the recipe."""

    sam: bool = True
    centralization: bool = True
    whitening: bool = True
    smoothing: bool = True
    meta: bool = True


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """The whole recipe, the recipe without each of its parts, and none of it, for the same seconds.

    Holds when, by more than two standard errors over seeds, the whole recipe beats the plain one, and no part costs
    more than it gives: the recipe without it does not beat the whole. All contenders have mirrored and shifted
    pictures, SGD with momentum and weight decay, a rate that rises and falls, and a rate of their own.
    """
    if full:
        effort, width = Effort(600.0, 3, 5000, 10_000, (0.02, 0.05, 0.1), 4000), 32
    else:
        effort, width = Effort(3.0, 3, 1000, 2000, (0.02, 0.05, 0.1), 1000), 8
    contenders = recipes()
    found = compare({name: beginning(s, width) for name, s in contenders.items()}, effort, seed)
    margins = {name: points_over(found[ALL], found[name]) for name in contenders if name != ALL}
    return Evidence(
        setup=setup(f"ResNet-9 of width {width}, SGD with momentum, batches of {BATCH}", effort, seed),
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins),
        figure=f"whole recipe {said(margins[PLAIN], 2)} points over plain; "
        + ", ".join(f"{said(m, 2)} over {name}" for name, m in margins.items() if name != PLAIN),
        limits="Fashion-MNIST instead of CIFAR-10, a narrower network and seconds instead of ten minutes, in which few "
        "passes fit; crops are shifts and there is no cutout. Values of the switches and the first-order meta step are "
        "reconstructions.",
    )


def recipes() -> dict[str, Switches]:
    """Name -> parts of every contender."""
    without = {f"without {f.name}": replace(Switches(), **{f.name: False}) for f in fields(Switches)}
    return {ALL: Switches(), **without, PLAIN: Switches(**{f.name: False for f in fields(Switches)})}


def judge(margins: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; margins are those of the whole recipe over the others."""
    return clearly(margins[PLAIN]) and all(matched(margin) for name, margin in margins.items() if name != PLAIN)


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int):
        super().__init__()
        self.inside = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3x3, BatchNorm, CELU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.CELU(0.3))


def resnet9(width: int) -> nn.Sequential:
    """(B, 1, H, W) -> (B, 10): eight convolutions, two residual parts, a linear layer."""
    return nn.Sequential(
        convolution(1, width),
        convolution(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width),
        convolution(2 * width, 4 * width), nn.MaxPool2d(2),
        convolution(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def beginning(switches: Switches, width: int) -> Begin:
    """A training with some parts of the recipe; whitening takes its statistics inside the time."""

    def begin(data: TensorDataset, seed: int, rate: float) -> Trainee:
        torch.manual_seed(seed)
        model = resnet9(width)
        if switches.whitening:
            set_module(model, "0.0", PatchWhitening().layer(data.tensors[0], width))
        order = torch.Generator().manual_seed(seed)
        batches = endless(DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order))
        learning = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.SGD(learning, lr=rate, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
        if switches.centralization:
            GradientCentralization().attach(base)
        return Trainee(model, base, lambda done: next(batches), step_of(switches, model, base))

    return begin


def step_of(switches: Switches, model: nn.Module, base: torch.optim.Optimizer) -> Callable[[tuple[Tensor, ...]], None]:
    """One update: of SAM's point when it is on, and of a second half of the batch ahead of the first's gradient."""
    sam = Sam().wrap(base, model) if switches.sam else None
    meta = MetaStep().wrap(base, model) if switches.meta else None
    smoothing = SMOOTHING if switches.smoothing else 0.0

    def backward(part: tuple[Tensor, Tensor]) -> None:
        F.cross_entropy(model(part[0]), part[1], label_smoothing=smoothing).backward()

    def step(batch: tuple[Tensor, ...]) -> None:
        base.zero_grad()
        whole = (augment(batch[0]), batch[1])
        gradient_(whole, backward, sam, meta)
        base.step()

    return step


def gradient_(
    batch: tuple[Tensor, Tensor],
    backward: Callable[[tuple[Tensor, Tensor]], None],
    sam: SamOptimizer | None,
    meta: MetaOptimizer | None,
) -> None:
    """Leaves the gradient of an update: SAM's on the first half, and with it the meta step's on the second."""
    first, second = halves(batch) if meta else (batch, batch)
    backward(first)
    if sam:
        with sam.perturbed():
            backward(first)
    if meta:
        with meta.ahead():
            backward(second)
