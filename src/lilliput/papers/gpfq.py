"""Greedy path following: does its relative error fall with the number of inputs, and does it beat rounding?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.hooks import evaluating
from lilliput.methods.quantize._coded import codable
from lilliput.methods.quantize._walk import execution_order
from lilliput.methods.quantize.data_free import best_step
from lilliput.methods.quantize.gpfq import alphabet_step, follow_path, paired_moments
from lilliput.methods.quantize.gptq import gptq
from lilliput.moments import Moments, grouped_weight
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._pictures import NETS, Table, accuracy_percent, calibration_draw, margin, pictures_workload
from lilliput.workload import Workload
from lilliput.zoo import images

paper = Paper(
    title="Post-training Quantization for Neural Networks with Provable Guarantees",
    authors="Jinjie Zhang, Yixuan Zhou, Rayan Saab",
    year=2022,
    arxiv="2201.11113",
    claim="Path following (GPFQ, Lybrand & Saab, arXiv 2010.15984) quantizes a layer with a relative squared error "
    "that falls about linearly in the number of inputs, where rounding's does not, and costs networks little accuracy.",
    methods=("quantize.gpfq",),
)

OURS, ROUNDING = "GPFQ", "rounding, same alphabet"
MULTIPLE = {4: 0.8, 3: 0.7, 2: 0.5}  # largest letter / mean over neurons of the largest |w|; fixed before any result
SAMPLES = 32  # m of the Gaussian experiment
INPUTS = (64, 128, 256, 512, 1024, 2048)
Rule = Callable[[Tensor, Moments, Tensor, int], Tensor]  # w (G, N, K), moments, step (G, N), bits -> quantized weights


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """One layer of Gaussian inputs, then whole networks.

    Holds when (1) over 64..2048 inputs the relative squared error falls with a log-log slope below -0.75 for GPFQ and
    stays above -0.25 for rounding, and (2) GPFQ's accuracy, averaged over networks and bit widths, is above rounding's
    on the same alphabet by more than twice the joint standard deviation over calibration draws.
    """
    bits, calibration, test, seeds = ((4, 3, 2), 512, 10_000, 5) if full else ((3, 2), 128, 2000, 3)
    table = Table()
    for s in range(seed, seed + seeds):
        gaussian_layer(table, s)
    for net in NETS:
        work = pictures_workload(net, calibration, test)
        for s in range(seed, seed + seeds):
            work.calibration = calibration_draw(images.fashion_mnist()["calibration"], calibration, s)
            compare(table, work, bits, repeat=s > seed)
    rows = table.rows()
    slopes, gain, holds = judge(rows)
    return Evidence(
        setup=f"Gaussian layers, m={SAMPLES}, 64 to 2048 inputs; {', '.join(NETS)} on Fashion-MNIST, {bits} bits, one "
        f"alphabet per layer, {calibration} calibration and {test} test pictures, {seeds} draws from seed {seed}, CPU",
        rows=rows,
        holds=holds,
        figure=f"error falls as inputs^{slopes[0]:.2f} (rounding ^{slopes[1]:.2f}); mean accuracy {gain[0]:+.1f} ± "
        f"{gain[1]:.1f} points over rounding on the same alphabet",
        limits="Small networks and pictures instead of ImageNet; weights only. GPTQ is given the same steps but may "
        "use one letter more (-2**(bits-1)); as published it aims at a layer's output on its changed inputs, GPFQ at "
        "the float network's, so only GPFQ makes good for earlier layers. Convolutions see a sample of their patches.",
    )


def gaussian_layer(table: Table, seed: int, neurons: int = 64, levels: int = 3) -> None:
    """Relative squared errors of one layer with uniform weights, for growing numbers of inputs."""
    generator = torch.Generator().manual_seed(seed)
    for k in INPUTS:
        x, w = torch.randn(SAMPLES, k, generator=generator), torch.rand(1, neurons, k, generator=generator) * 2 - 1
        gram, step = (x.T @ x)[None], torch.full((1, neurons), 1 / levels)
        codes = follow_path(w, gram, gram, step, levels)
        for name, q in ((OURS, codes), (ROUNDING, (w * levels).round())):
            error = ((w - q / levels) @ x.T).square().sum() / (w @ x.T).square().sum()
            table.add(name, f"relative_squared_error_{k}_inputs", float(error))


def compare(table: Table, work: Workload, bits: Sequence[int], repeat: bool = False) -> None:
    """Accuracies of every contender on one network; those that see no data run only when this is no repeat."""
    if not repeat:
        table.add("float", f"{work.name}_accuracy_percent", accuracy_percent(work.model, work))
    for b in bits:
        for name, rule in RULES.items():
            if repeat and rule in DATA_FREE:
                continue
            start, model = perf_counter(), quantized(work, b, rule)
            table.add(name, f"{work.name}_{b}_bits_seconds", perf_counter() - start)
            table.add(name, f"{work.name}_{b}_bits_accuracy_percent", accuracy_percent(model, work))


@torch.no_grad()
def quantized(work: Workload, bits: int, rule: Rule) -> nn.Module:
    """A copy of the network with quantized weights, each layer made for what the quantized ones before it give."""
    model, levels = copy.deepcopy(work.model), 2 ** (bits - 1) - 1
    with evaluating(model):
        for name in execution_order(work.model, work, codable(model)):
            layer = model.get_submodule(name)
            w = grouped_weight(layer)
            step = alphabet_step(w, levels, "max", MULTIPLE[bits], per_neuron=False)
            data = rule not in DATA_FREE
            moments = paired_moments(model, work.model, work, work.calibration, name) if data else Moments(name)
            weight = layer.get_parameter("weight")
            weight.copy_(rule(w, moments, step, bits).view(weight.shape))
    return model


def _path(w: Tensor, moments: Moments, step: Tensor, bits: int) -> Tensor:
    codes = follow_path(w, moments.gram, moments.get("cross"), step, 2 ** (bits - 1) - 1)
    return codes * step.unsqueeze(-1)


def _rounded(w: Tensor, moments: Moments, step: Tensor, bits: int) -> Tensor:
    levels, step = 2 ** (bits - 1) - 1, step.unsqueeze(-1)
    return (w / step).round().clamp(-levels, levels) * step


def _rounded_best(w: Tensor, moments: Moments, step: Tensor, bits: int) -> Tensor:
    best = best_step(w, 2 ** (bits - 1) - 1, per_channel=False, search=40)
    return _rounded(w, moments, best.squeeze(-1), bits)


def _gptq(w: Tensor, moments: Moments, step: Tensor, bits: int) -> Tensor:
    done = []
    for weights, hessian, steps in zip(w, moments.gram, step):
        grid = (steps.unsqueeze(1), torch.zeros(len(steps), 1))
        q, _, _ = gptq(weights, hessian, bits, weights.shape[1], grid=grid)
        done.append((q - 2 ** (bits - 1)) * grid[0])
    return torch.stack(done)


RULES: dict[str, Rule] = {
    OURS: _path,
    ROUNDING: _rounded,
    "rounding, least-error alphabet": _rounded_best,
    "GPTQ, same alphabet": _gptq,
}
DATA_FREE = (_rounded, _rounded_best)


def judge(rows: Sequence[Row]) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """Slopes of the errors of GPFQ and rounding, mean gain in accuracy with its deviation, and whether both hold."""
    ours, rounding = (next(r for r in rows if r.name == name) for name in (OURS, ROUNDING))
    slopes = slope(ours), slope(rounding)
    gain = margin(ours, rounding, [k for k in ours.values if k.endswith("bits_accuracy_percent")])
    return slopes, gain, bool(slopes[0] < -0.75 and slopes[1] > -0.25 and gain[0] > 2 * gain[1])


def slope(row: Row) -> float:
    """Log-log slope of the relative squared error over the number of inputs."""
    errors = [row.values[f"relative_squared_error_{k}_inputs"] for k in INPUTS]
    return float(np.polyfit(np.log(INPUTS), np.log(errors), 1)[0])
