"""Residual signs: do more levels of binary activations win accuracy, at a cost in time that is no more than linear?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lilliput.kernels import isa
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits.streaming import Streaming
from lilliput.methods.quantize.binary import BinaryLinear, pack
from lilliput.metrics.latency import paired_ratio, wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._binary_nets import Trained, one_thread_ms, timing, trained
from lilliput.papers._circuits import hardware, lacking
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._low_rank import Effort, pictures_work
from lilliput.papers._paired import points_over

paper = Paper(
    title="ReBNet: Residual Binarized Neural Network",
    authors="Mohammad Ghasemzadeh, Mohammad Samragh, Farinaz Koushanfar",
    year=2017,
    arxiv="1711.01243",
    claim="Activations as a sum of M signs with learned coefficients make a binary network more accurate with each "
    "level, on the same weights and the same XNOR-popcount datapath, whose throughput falls about as 1/M.",
    methods=("quantize.binary", "circuits.streaming"),
)

RATE = 3e-3  # of learning, for all; fixed before any result
WIDTH, TIMED = 256, (64, 1024)  # of the hidden layers; pictures and width of the layer that is timed
CHIP, CYCLES, FRAMES = "ecp5-25k", 7000, 50  # of the circuits: cycles of the slowest stage, pictures that are simulated
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
    times = one_thread_ms(layers, torch.randn(tokens, width), effort.rounds)
    circuits = {} if lacking() else {m: circuit(found[f"ReBNet M={m}"].network, seed, effort) for m in (1, 2, 3)}
    return evidence(found, times, effort, seed, busy, circuits)


def circuit(network: nn.Module, seed: int, effort: Effort) -> dict[str, float]:
    """Cells, cycles and accuracy of a packed network as a circuit whose slowest stage takes CYCLES at most."""
    work = pictures_work(network, seed, effort)
    design = Streaming(cycles=CYCLES).emit(network, work)
    x, labels = (torch.cat([batch[key] for batch in work.test]) for key in ("input", "label"))
    q = design.net.read(x)
    right = (design.net(q).argmax(1) == labels).float().mean()
    return {"circuit_accuracy_percent": 100 * float(right), **hardware(design, q[:FRAMES], Fpga.load(CHIP))}


EFFORT = Effort(steps=800, test_pictures=4000, rounds=10, seeds=3)


def evidence(
    found: dict[str, Trained],
    times: dict[str, list[float]],
    effort: Effort,
    seed: int,
    busy: float,
    circuits: Mapping[int, Mapping[str, float]] = {},
) -> Evidence:
    """Rows and verdict of what was trained, timed and, if at all, made into circuits of M levels."""
    levels = [found[f"ReBNet M={m}"] for m in (1, 2, 3)]
    second, third = points_over(levels[1], levels[0]), points_over(levels[2], levels[1])
    uniform, behind = points_over(levels[1], found[UNIFORM]), points_over(levels[2], found["float32"])
    cost = {m: paired_ratio(times[f"ReBNet M={m}"], times["ReBNet M=1"]).ratio for m in (2, 3)}
    holds = clearly(second) and matched(third) and all(ratio <= COST * m for m, ratio in cost.items())
    return Evidence(
        setup=f"784-{WIDTH}-{WIDTH}-{WIDTH}-10, Fashion-MNIST, {effort.steps} steps of {effort.batch_size} pictures, "
        f"{effort.test_pictures} test pictures, seeds {seed} to {seed + effort.seeds - 1}; layer_ms: {TIMED[1]} x "
        f"{TIMED[1]}, batch {TIMED[0]}, {isa()}, 1 thread; other work kept {busy:.1f} cores busy",
        rows=[_row(name, one, times[name], circuits) for name, one in found.items()],
        holds=bool(holds),
        figure=f"M=2 {said(second, 1)} points over M=1, M=3 {said(third, 1)} over M=2 ({behind[0]:+.1f} from float32; "
        f"M=2 {said(uniform, 1)} from 2-bit uniform); a layer takes "
        f"{cost[2]:.2f} and {cost[3]:.2f} times the time of M=1{_area(circuits)}",
        limits="A multi-layer perceptron, briefly trained, on pictures of mean 0 and deviation 1 (not -1..1); the rule "
        "is on the time on a CPU. The circuits count all planes at once, so their area grows where the paper's "
        "throughput falls; they were synthesised, not placed. Coefficients of one level are fixed: the layer's scale "
        "is the same factor.",
    )


def _row(name: str, one: Trained, times: list[float], circuits: Mapping[int, Mapping[str, float]]) -> Row:
    values, spread = timing(times)
    return one.row(name, values | dict(next((c for m, c in circuits.items() if name == f"ReBNet M={m}"), {})), spread)


def _area(circuits: Mapping[int, Mapping[str, float]]) -> str:
    if not circuits:
        return ""
    tables = ", ".join(f"{c['luts']:.0f}" for c in circuits.values())
    return (
        f"; as circuits M=1, 2, 3 take {tables} look-up tables at {circuits[1]['cycles_per_frame']:.0f} cycles a frame"
    )
