"""Residual signs: do more levels of binary activations win accuracy, at a cost in time that is no more than linear?"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from lilliput.kernels import isa
from lilliput.methods.quantize.binary import BinaryLinear, pack
from lilliput.metrics.latency import paired_ratio, wait_until_quiet
from lilliput.paper import Evidence, Paper
from lilliput.papers._binary_nets import Trained, one_thread_ms, timing, trained
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._low_rank import Effort
from lilliput.papers._paired import points_over

paper = Paper(
    title="ReBNet: Residual Binarized Neural Network",
    authors="Mohammad Ghasemzadeh, Mohammad Samragh, Farinaz Koushanfar",
    year=2017,
    arxiv="1711.01243",
    claim="Activations as a sum of M signs with learned coefficients make a binary network more accurate with each "
    "level, on the same weights and the same XNOR-popcount datapath, whose throughput falls about as 1/M.",
    methods=("quantize.binary",),
)

RATE = 3e-3  # of learning, for all; fixed before any result
WIDTH, TIMED = 256, (64, 1024)  # of the hidden layers; pictures and width of the layer that is timed
COST = 1.1  # times M: what a network of M levels may take
FORMS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "ReBNet M=1": {"levels": 1, "scale": "layer"},
    "ReBNet M=2": {"levels": 2, "scale": "layer"},
    "ReBNet M=3": {"levels": 3, "scale": "layer"},
    "BNN (unscaled signs)": {"levels": 1, "scale": "none"},
    "XNOR scaling (alpha, K)": {"levels": 1, "scale": "alpha_K"},
    "2-bit uniform": {"levels": 2, "scale": "layer"},
}
UNIFORM = "2-bit uniform"  # coefficients stay 2/3 and 1/3: -1, -1/3, 1/3, 1


def network(name: str) -> nn.Sequential:
    """784-256-256-256-10, every layer binary with a BatchNorm behind it, real inputs to the first; or all float."""
    form, sizes = FORMS[name], (784, WIDTH, WIDTH, WIDTH, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers += [linear(inputs, outputs, name, first=i == 0), nn.BatchNorm1d(outputs)]
        if form is None and outputs != 10:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def linear(inputs: int, outputs: int, name: str, first: bool = False) -> nn.Module:
    """A layer of the form, without bias; the first one takes its inputs as they are."""
    form = FORMS[name]
    if form is None:
        return nn.Linear(inputs, outputs, bias=False)
    if first:
        scale = "alpha" if form["scale"] == "alpha_K" else form["scale"]
        return BinaryLinear(inputs, outputs, bias=False, activations="real", scale=scale)
    layer = BinaryLinear(inputs, outputs, bias=False, **form)
    if name == UNIFORM and layer.levels is not None:
        layer.levels.requires_grad_(False)
    return layer


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Seven networks on Fashion-MNIST, scored in their packed form, and one layer of each timed packed.

    Holds when, by more than two standard errors over seeds, two levels are more accurate than one and three are not
    less than two, and the median time of a layer of M levels is at most COST * M times that of one level.
    """
    effort = Effort(steps=6000, test_pictures=10_000, rounds=30, seeds=5) if full else EFFORT
    found = {name: trained(lambda name=name: network(name), seed, effort, RATE) for name in FORMS}
    busy = wait_until_quiet()
    torch.manual_seed(seed)
    tokens, width = TIMED
    layers = {name: pack(linear(width, width, name)).eval() for name in FORMS}
    return evidence(found, one_thread_ms(layers, torch.randn(tokens, width), effort.rounds), effort, seed, busy)


EFFORT = Effort(steps=800, test_pictures=4000, rounds=10, seeds=3)


def evidence(
    found: dict[str, Trained], times: dict[str, list[float]], effort: Effort, seed: int, busy: float
) -> Evidence:
    """Rows and verdict of what was trained and timed."""
    levels = [found[f"ReBNet M={m}"] for m in (1, 2, 3)]
    second, third = points_over(levels[1], levels[0]), points_over(levels[2], levels[1])
    uniform, behind = points_over(levels[1], found[UNIFORM]), points_over(levels[2], found["float32"])
    cost = {m: paired_ratio(times[f"ReBNet M={m}"], times["ReBNet M=1"]).ratio for m in (2, 3)}
    holds = clearly(second) and matched(third) and all(ratio <= COST * m for m, ratio in cost.items())
    return Evidence(
        setup=f"784-{WIDTH}-{WIDTH}-{WIDTH}-10, Fashion-MNIST, {effort.steps} steps of {effort.batch_size} pictures, "
        f"{effort.test_pictures} test pictures, seeds {seed} to {seed + effort.seeds - 1}; layer_ms: {TIMED[1]} x "
        f"{TIMED[1]}, batch {TIMED[0]}, {isa()}, 1 thread; other work kept {busy:.1f} cores busy",
        rows=[one.row(name, *timing(times[name])) for name, one in found.items()],
        holds=bool(holds),
        figure=f"M=2 {said(second, 1)} points over M=1, M=3 {said(third, 1)} over M=2 ({behind[0]:+.1f} from float32; "
        f"M=2 {said(uniform, 1)} from 2-bit uniform); a layer takes "
        f"{cost[2]:.2f} and {cost[3]:.2f} times the time of M=1",
        limits="A multi-layer perceptron, briefly trained, on pictures of mean 0 and deviation 1 (not -1..1); time on "
        "a CPU, not area and throughput of an FPGA. Thresholds are not folded into the BatchNorms. Coefficients of one "
        "level are fixed: the layer's scale is the same factor.",
    )
