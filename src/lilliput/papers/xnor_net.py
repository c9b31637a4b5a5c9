"""Binary weights, and binary inputs with them: what they cost in accuracy, and what a convolution gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lilliput.kernels import isa
from lilliput.methods.quantize.binary import BinaryConv2d, pack
from lilliput.metrics.latency import paired_ratio, wait_until_quiet
from lilliput.paper import Evidence, Paper
from lilliput.papers._binary_nets import Trained, one_thread_ms, timing, trained
from lilliput.papers._healed import clearly, close, said
from lilliput.papers._low_rank import Effort
from lilliput.papers._paired import points_over

paper = Paper(
    title="XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
    authors="Mohammad Rastegari, Vicente Ordonez, Joseph Redmon, Ali Farhadi",
    year=2016,
    arxiv="1603.05279",
    claim="Binary weights with a scale per filter are about as accurate as float ones at 1/32 of the memory, and "
    "better than unscaled ones (BinaryConnect); with binary inputs, too, convolutions are up to 58 times faster, at a "
    "loss.",
    methods=("quantize.binary",),
)

TOLERATED_POINTS = 3.0  # the paper's Binary-Weight-Network is 0.2 to 8.5 points of top-1 below float on ImageNet
RATE = 3e-3  # of learning, for all; fixed before any result
LAYER = (256, 256, 14)  # inputs, filters, width of the pictures of the convolution that is timed: the paper's typical
FORMS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "BWN": {"activations": "real"},
    "BinaryConnect": {"activations": "real", "scale": "none"},
    "XNOR": {"activations": "sign"},
    "XNOR + K": {"activations": "sign", "scale": "alpha_K"},
}
Make = Callable[[int, int], nn.Module]  # inputs, outputs -> a 3x3 convolution


def network(form: dict[str, Any] | None) -> nn.Sequential:
    """Conv-4: a float convolution, three of the form, each after a BatchNorm and before pooling, a float classifier.

    Real inputs go through a ReLU after the BatchNorm, where signs take the other forms' inputs.
    """
    real = form is None or form["activations"] == "real"

    def block(inputs: int, outputs: int, pool: bool) -> list[nn.Module]:
        parts = [nn.BatchNorm2d(inputs), nn.ReLU() if real else nn.Identity(), convolution(inputs, outputs, form)]
        return [*parts, nn.MaxPool2d(2)] if pool else parts

    layers = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), *block(16, 32, True), *block(32, 32, False), *block(32, 64, True)]
    return nn.Sequential(*layers, nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 9, 10))


def convolution(inputs: int, outputs: int, form: dict[str, Any] | None) -> nn.Module:
    """3x3, zero-padded, without bias: float, or binary in one of the forms."""
    if form is None:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return BinaryConv2d(inputs, outputs, 3, padding=1, bias=False, **form)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Five Conv-4 on Fashion-MNIST, scored in their packed form, and one typical convolution timed in each form.

    Holds when (1) BWN, two standard errors over seeds included, is not TOLERATED_POINTS below float32, (2) it is above
    BinaryConnect by more than two standard errors, and (3) the packed XNOR convolution, its inputs packed inside the
    time, is surely faster than torch's float32 on one thread. The paper's 58 times is reported, not asked for.
    """
    effort = Effort(steps=3000, test_pictures=10_000, rounds=30, seeds=5) if full else EFFORT
    found = {name: trained(lambda form=form: network(form), seed, effort, RATE) for name, form in FORMS.items()}
    busy = wait_until_quiet()
    torch.manual_seed(seed)
    inputs, filters, width = LAYER
    layers = {name: pack(convolution(inputs, filters, form)).eval() for name, form in FORMS.items()}
    times = one_thread_ms(layers, torch.randn(1, inputs, width, width), effort.rounds)
    return evidence(found, times, effort, seed, busy)


EFFORT = Effort(steps=400, test_pictures=4000, rounds=10, seeds=3)


def evidence(
    found: dict[str, Trained], times: dict[str, list[float]], effort: Effort, seed: int, busy: float
) -> Evidence:
    """Rows and verdict of what was trained and timed."""
    bwn, unscaled = points_over(found["BWN"], found["float32"]), points_over(found["BWN"], found["BinaryConnect"])
    xnor, scaled = points_over(found["XNOR"], found["float32"]), points_over(found["XNOR + K"], found["XNOR"])
    speed = paired_ratio(times["float32"], times["XNOR"])
    holds = close(bwn, TOLERATED_POINTS) and clearly(unscaled) and speed.gain
    return Evidence(
        setup=f"Conv-4 (16, 32, 32, 64 filters), Fashion-MNIST, {effort.steps} steps of {effort.batch_size} pictures, "
        f"{effort.test_pictures} test pictures, seeds {seed} to {seed + effort.seeds - 1}; layer_ms: 3x3, "
        f"{LAYER[0]} to {LAYER[1]} channels, {LAYER[2]}x{LAYER[2]}, {isa()}, 1 thread; other work kept {busy:.1f} "
        "cores busy",
        rows=[one.row(name, *timing(times[name])) for name, one in found.items()],
        holds=bool(holds),
        figure=f"BWN {said(bwn, 1)} points from float32 and {said(unscaled, 1)} from BinaryConnect; XNOR "
        f"{said(xnor, 1)} from float32, K {said(scaled, 1)}; XNOR convolution {speed} over torch's float32, not 58 "
        "times",
        limits="A small network, pictures and training instead of AlexNet on ImageNet. A BatchNorm follows every "
        "binary layer and takes up its scale, so unscaled weights lose less than in the paper's comparison. The 58 "
        "times are against a plain float convolution; torch's is far faster. BWN's convolution unpacks its weights at "
        "every call.",
    )
