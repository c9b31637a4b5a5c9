"""Separable attention: is it faster than multi-head attention where tokens are many, and as accurate for the time?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch
from torch import nn

from lilliput._probe import torch_threads
from lilliput.methods.distill.logits import Logits, batches_of
from lilliput.methods.layers.separable_attention import SeparableAttention, SeparableSelfAttention
from lilliput.metrics.latency import Comparison, paired_ratio, wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import close, said
from lilliput.papers._low_rank import Effort, interleave, middle, pictures_work
from lilliput.papers._paired import points_over
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="Separable Self-attention for Mobile Vision Transformers",
    authors="Sachin Mehta, Mohammad Rastegari",
    year=2022,
    arxiv="2206.02680",
    claim="Self-attention by one context that all tokens share takes time in proportion to the tokens, not to their "
    "square, is faster than multi-head attention on small devices, and as accurate.",
    methods=("layers.separable_attention",),
)

HEADS, SEPARABLE = "multi-head", "separable"
CONVERTED, COARSE = "multi-head, then separable and distilled", "multi-head, patches of twice the width"
DIM, LAYERS = 32, 3
TOKENS = (64, 256, 1024, 4096)
MANY = TOKENS[-2:]  # where the claim must show
TOLERATED_POINTS = 1.0  # that count as being as accurate, two standard errors included
Fit = Callable[[Workload, float, float, int], nn.Module]  # data and an untrained net, seconds, rate, seed


def network(patch: int) -> nn.Module:
    """A small vision transformer: 197 tokens with patches of 2 pixels, 50 with 4."""
    return nets.vit(dim=DIM, layers=LAYERS, heads=2, mlp_ratio=2, patch=patch)


def fit_(model: nn.Module, work: Workload, seconds: float, rate: float, seed: int) -> nn.Module:
    train(model, batches_of(work), work.loss, seconds=seconds, lr=rate, clip_norm=1.0, seed=seed)
    return model.eval()


def attending(work: Workload, seconds: float, rate: float, seed: int) -> nn.Module:
    """The network as it is."""
    return fit_(copy.deepcopy(work.model), work, seconds, rate, seed)


def separable(work: Workload, seconds: float, rate: float, seed: int) -> nn.Module:
    """The same with separable attention from the start."""
    return fit_(SeparableAttention(start="fresh", seed=seed).apply(work.model), work, seconds, rate, seed)


def converted(work: Workload, seconds: float, rate: float, seed: int) -> nn.Module:
    """Half of the time for the teacher, half for its conversion."""
    work.model = fit_(work.model, work, seconds / 2, rate, seed)
    heal = Logits(steps=10**6, seconds=seconds / 2, lr=rate, seed=seed)
    return heal.apply(SeparableAttention(seed=seed).apply(work.model), work)


@dataclass(frozen=True)
class Contender:
    fit: Fit
    patch: int
    rate: float


CONTENDERS = {
    HEADS: Contender(attending, 2, 3e-3),
    SEPARABLE: Contender(separable, 2, 3e-3),
    CONVERTED: Contender(converted, 2, 3e-3),
    COARSE: Contender(attending, 4, 3e-3),
}


@dataclass
class Found:
    """Accuracies of one contender, a value per seed, and its last network."""

    accuracies: list[float] = field(default_factory=list)
    network: nn.Module = field(default_factory=nn.Identity)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """One layer of each kind at 64 to 4,096 tokens, and vision transformers of 197 tokens trained as many seconds.

    Holds when separable attention is surely faster at every length of MANY, its time there growing with a smaller power
    of the tokens, and when its network, two standard errors over seeds included, is not TOLERATED_POINTS below the
    multi-head one. `full` trains fifteen times as long, on five seeds.
    """
    seconds, effort = (150.0, Effort(3000, 10_000, 30, 5, 32)) if full else (10.0, Effort(1500, 1000, 15, 3, 32))
    found = {name: Found() for name in CONTENDERS}
    for s in range(seed, seed + effort.seeds):
        compare(found, s, seconds, effort)
    busy = wait_until_quiet()
    layers = {n: layer_times(n, effort.rounds, seed) for n in TOKENS}
    nets_ms = network_times({name: one.network for name, one in found.items()}, effort.rounds, seed)
    return evidence(found, layers, nets_ms, seconds, effort, seed, busy)


def compare(found: Mapping[str, Found], seed: int, seconds: float, effort: Effort) -> None:
    """Every contender on one seed, which sets first weights, pictures and their order."""
    for name, contender in CONTENDERS.items():
        torch.manual_seed(seed)
        work = pictures_work(network(contender.patch), seed, effort)
        model = contender.fit(work, seconds, contender.rate, seed)
        found[name].accuracies.append(work.score(model, "test").value)
        found[name].network = model


def layer_times(tokens: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of one layer of each kind for one sequence, in turn, on one thread."""
    torch.manual_seed(seed)
    layers = {HEADS: nets.Attention(64, 4).eval(), SEPARABLE: SeparableSelfAttention(64).eval()}
    x = torch.randn(1, tokens, 64)
    with torch_threads(1), torch.inference_mode():
        return interleave({name: lambda layer=layer: layer(x) for name, layer in layers.items()}, rounds)


def network_times(networks: Mapping[str, nn.Module], rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of one picture, in turn, on one thread."""
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    with torch_threads(1), torch.inference_mode():
        return interleave({name: lambda model=model: model(x) for name, model in networks.items()}, rounds)


def power(times: Mapping[int, Mapping[str, Sequence[float]]], kind: str, lengths: Sequence[int] = MANY) -> float:
    """The power of the tokens with which the time of one kind grows between two lengths."""
    first, last = (middle(list(times[n][kind]))[0] for n in (lengths[0], lengths[-1]))
    return math.log(last / first) / math.log(lengths[-1] / lengths[0])


def judge(faster: Sequence[Comparison], powers: tuple[float, float], points: tuple[float, float]) -> bool:
    """The rule of `experiment`: speeds at many tokens, powers (separable, multi-head), points of accuracy."""
    return all(one.gain for one in faster) and powers[0] < powers[1] and close(points, TOLERATED_POINTS)


def evidence(
    found: Mapping[str, Found],
    layers: Mapping[int, Mapping[str, Sequence[float]]],
    nets_ms: Mapping[str, Sequence[float]],
    seconds: float,
    effort: Effort,
    seed: int,
    busy: float,
) -> Evidence:
    """Rows and verdict of what was trained and timed."""
    speeds = {n: paired_ratio(times[HEADS], times[SEPARABLE]) for n, times in layers.items()}
    powers = power(layers, SEPARABLE), power(layers, HEADS)
    gains = {name: points_over(found[SEPARABLE], found[name]) for name in CONTENDERS if name != SEPARABLE}
    points = {name: said(gain, 1) for name, gain in gains.items()}
    return Evidence(
        setup=f"layers of width 64 (4 heads), one sequence, 1 thread; vision transformers of width {DIM} and {LAYERS} "
        f"layers, 197 tokens, Fashion-MNIST, {seconds:.0f} s of training each, {effort.test_pictures} test pictures, "
        f"seeds {seed} to {seed + effort.seeds - 1}; {torch.get_num_threads()} threads, CPU; other work kept "
        f"{busy:.1f} cores busy",
        rows=[*network_rows(found, nets_ms), *layer_rows(layers)],
        holds=judge([speeds[n] for n in MANY], powers, gains[HEADS]),
        figure="separable over multi-head: "
        + ", ".join(f"{one.ratio:.2f}x at {n} tokens" for n, one in speeds.items())
        + f", growing with power {powers[0]:.2f} and {powers[1]:.2f}; {points[HEADS]} points of accuracy for the same "
        f"seconds ({points[COARSE]} against four times fewer tokens, {points[CONVERTED]} against conversion)",
        limits="torch on one core, not a phone; torch's multi-head attention is fused and never stores its matrix. "
        "Tiny vision transformers without convolutions, seconds of training: not MobileViTv2 on ImageNet.",
    )


def network_rows(found: Mapping[str, Found], times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Accuracy with its deviation over seeds, and the time of a picture."""
    rows = []
    for name, one in found.items():
        ms, spread = middle(list(times[name]))
        deviation = stdev(one.accuracies) if len(one.accuracies) > 1 else 0.0
        values = {"accuracy_percent": fmean(one.accuracies), "picture_ms": ms}
        rows.append(Row(name, values, {"accuracy_percent": deviation, "picture_ms": spread}))
    return rows


def layer_rows(layers: Mapping[int, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Milliseconds of a layer of each kind by the number of tokens."""
    rows = []
    for kind in (HEADS, SEPARABLE):
        taken = {f"ms_at_{n}_tokens": middle(list(times[kind])) for n, times in layers.items()}
        values, spread = ({key: pair[i] for key, pair in taken.items()} for i in range(2))
        rows.append(Row(f"layer, {kind}", values, spread))
    return rows
