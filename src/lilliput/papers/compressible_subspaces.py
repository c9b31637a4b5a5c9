"""LCS: is one training of a line of networks as good, at every width, as a network trained for that width?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from time import perf_counter

import torch
from torch import nn

from lilliput.methods.distill.logits import batches_of
from lilliput.methods.prune.channels import Channels
from lilliput.methods.train.compressible_subspaces import CompressibleSubspaces, at
from lilliput.metrics.memory import weight_bytes
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import close, said
from lilliput.papers._low_rank import Effort, interleave, middle, pictures_work, speedup
from lilliput.papers._paired import advantage_by_seed
from lilliput.papers._policies import renew_norms_
from lilliput.papers.hidden_networks import network
from lilliput.training import train
from lilliput.workload import Workload

paper = Paper(
    title="LCS: Learning Compressible Subspaces for Efficient, Adaptive, Real-Time Network Compression at Inference "
    "Time",
    authors="Elvis Nunez, Maxwell Horton, Anish Prabhu, Anurag Ranjan, Ali Farhadi, Mohammad Rastegari",
    year=2021,
    arxiv="2110.04252",
    claim="One line of networks, trained once with norms that hold no statistics, can be compressed to any rate at run "
    "time, without training or new statistics, and is as accurate as networks trained for each rate.",
    methods=("train.compressible_subspaces",),
)

LINE, POINT = "line (LCS+L)", "point (LCS+P)"
ANEW = "one net, batch norms' statistics taken anew"
SEPARATE, PRUNED = "a net trained for each width", "one net, pruned and tuned for each width"
ALPHAS = (0.0, 0.5, 1.0)
LOWEST, WIDTH = 0.25, 16
TOLERATED_POINTS = 1.0  # that count as being as accurate, two standard errors included
STATISTICS = 16  # batches from which they are taken anew


@dataclass
class Served:
    """The networks of one contender, by alpha, the bytes that are stored for them and how long one takes to make."""

    networks: dict[float, nn.Module]
    stored_bytes: int
    switch_ms: float


Make = Callable[[Workload, float, float, int], Served]  # data and an untrained net, seconds, rate, seed


def subspace(mode: str, norm: str) -> Make:
    """All widths by one training; those with batch norms see data again for each."""

    def make(work: Workload, seconds: float, rate: float, seed: int) -> Served:
        method = CompressibleSubspaces("structured", mode, LOWEST, norm, "fresh", steps=10**7, seconds=seconds, lr=rate)
        found = method.with_(seed=seed).apply(work.model, work)
        networks, start = {}, perf_counter()
        for alpha in ALPHAS:
            networks[alpha] = at(found, alpha)
            if norm == "batch":
                renew_norms_(networks[alpha], work)
        switch_ms = (perf_counter() - start) * 1e3 / len(ALPHAS)
        return Served(networks, weight_bytes(found), switch_ms)

    return make


def separate(work: Workload, seconds: float, rate: float, seed: int) -> Served:
    """A network with batch norms for each width, with an equal part of the time."""
    first = CompressibleSubspaces("structured", "point", LOWEST, "batch", steps=0).apply(work.model, work)
    networks = {alpha: at(first, alpha) for alpha in ALPHAS}
    for narrow in networks.values():
        fit_(narrow, work, seconds / len(ALPHAS), rate, seed)
    return Served(networks, sum(map(weight_bytes, networks.values())), 0.0)


def pruned(work: Workload, seconds: float, rate: float, seed: int) -> Served:
    """The widest network is trained first; the others are cut out of it and tuned, with an equal part of the time."""
    networks = {1.0: copy.deepcopy(work.model)}
    fit_(networks[1.0], work, seconds / len(ALPHAS), rate, seed)
    for alpha in ALPHAS[:-1]:
        share = LOWEST + (1 - LOWEST) * alpha
        networks[alpha] = Channels(ratio=1 - share).apply(networks[1.0], work)
        fit_(networks[alpha], work, seconds / len(ALPHAS), rate, seed)
    return Served(networks, sum(map(weight_bytes, networks.values())), 0.0)


def fit_(network: nn.Module, work: Workload, seconds: float, rate: float, seed: int) -> None:
    train(network, batches_of(work), work.loss, seconds=seconds, lr=rate, clip_norm=1.0, seed=seed)


@dataclass(frozen=True)
class Contender:
    make: Make
    rate: float


# Better than 3e-3 on validation pictures for the line, for statistics taken anew and for separate nets (one seed).
CONTENDERS = {
    LINE: Contender(subspace("line", "group"), 1e-2),
    POINT: Contender(subspace("point", "group"), 1e-2),
    ANEW: Contender(subspace("point", "batch"), 1e-2),
    SEPARATE: Contender(separate, 1e-2),
    PRUNED: Contender(pruned, 1e-2),
}


@dataclass
class Found:
    """What was measured of one contender: accuracies by alpha, a value per seed, and figures of the last seed."""

    accuracies: dict[float, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    networks: dict[float, nn.Module] = field(default_factory=dict)

    def means(self) -> list[float]:
        """Accuracy averaged over the widths, of each seed."""
        return [fmean(values) for values in zip(*self.accuracies.values())]

    def row(self, name: str) -> Row:
        """Accuracies with their deviation over seeds, and the figures."""
        columns = {f"accuracy_percent_at_width_{share(a):.2f}": v for a, v in self.accuracies.items()}
        columns["mean_accuracy_percent"] = self.means()
        values = {key: fmean(v) for key, v in columns.items()}
        spread = {key: stdev(v) if len(v) > 1 else 0.0 for key, v in columns.items()}
        return Row(name, values | self.values, spread)


def share(alpha: float) -> float:
    """Of the channels at a point."""
    return LOWEST + (1 - LOWEST) * alpha


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Conv-4 for Fashion-MNIST at three widths, each contender with the same seconds of training in all.

    Holds when the line's accuracy, averaged over the widths, two standard errors over seeds included, is not
    TOLERATED_POINTS below that of networks trained for each width, nor below one net whose batch norms see data again
    at each width. `full` trains twelve times as long, on five seeds.
    """
    seconds, effort = (120.0, Effort(850, 10_000, 30, 5)) if full else (10.0, Effort(850, 4000, 15, 3))
    found = {name: Found() for name in CONTENDERS}
    for s in range(seed, seed + effort.seeds):
        compare(found, s, seconds, effort)
    times = timed(found[LINE].networks, effort.rounds, seed)
    return evidence(found, times, seconds, effort, seed)


def compare(found: Mapping[str, Found], seed: int, seconds: float, effort: Effort) -> None:
    """Every contender on one seed, which sets first weights, pictures and their order."""
    for name, contender in CONTENDERS.items():
        torch.manual_seed(seed)
        work = pictures_work(network(WIDTH), seed, effort)
        work.calibration = list(work.training or ())[:STATISTICS]
        served = contender.make(work, seconds, contender.rate, seed)
        for alpha in ALPHAS:
            accuracy = work.score(served.networks[alpha].eval(), "test").value
            found[name].accuracies.setdefault(alpha, []).append(accuracy)
        found[name].values |= {"stored_bytes": float(served.stored_bytes), "switch_ms": served.switch_ms}
        found[name].networks = served.networks


def timed(networks: Mapping[float, nn.Module], rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of sixteen pictures at the ends of the line, in torch, in turn."""
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    runs = {f"width {share(a):.2f}": networks[a] for a in (0.0, 1.0)}
    with torch.inference_mode():
        return interleave({name: lambda run=run: run(x) for name, run in runs.items()}, rounds)


def judge(over_separate: tuple[float, float], over_anew: tuple[float, float]) -> bool:
    """The rule of `experiment`; margins are (points by which the line is better, standard error)."""
    return close(over_separate, TOLERATED_POINTS) and close(over_anew, TOLERATED_POINTS)


def evidence(
    found: Mapping[str, Found], times: Mapping[str, list[float]], seconds: float, effort: Effort, seed: int
) -> Evidence:
    """Rows and verdict of what was trained and timed."""
    means = {name: one.means() for name, one in found.items()}
    gains = {name: advantage_by_seed(means[LINE], means[name]) for name in CONTENDERS if name != LINE}
    points = {name: said(gain, 1) for name, gain in gains.items()}
    rows = [one.row(name) for name, one in found.items()]
    for name, taken in times.items():
        ms, spread = middle(list(taken))
        rows.append(Row(f"line, {name}", {"latency_ms": ms}, {"latency_ms": spread}))
    slow, fast = f"width {share(1.0):.2f}", f"width {share(0.0):.2f}"
    return Evidence(
        setup=f"Conv-4 (16, 32, 32, 64 filters), Fashion-MNIST, widths {', '.join(f'{share(a):.2f}' for a in ALPHAS)}, "
        f"{seconds:.0f} s of training a contender in all, {effort.test_pictures} test pictures, seeds {seed} to "
        f"{seed + effort.seeds - 1}; {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(gains[SEPARATE], gains[ANEW]),
        figure=f"the line, averaged over widths: {points[SEPARATE]} points from nets trained for each width, "
        f"{points[ANEW]} from batch norms with new statistics, {points[PRUNED]} from pruned nets, {points[POINT]} from "
        f"one set of weights; a quarter of the width is {speedup(times, fast, slow)} over the whole",
        limits="Channels only, three widths of a small net, seconds where the paper has 200 epochs of CIFAR-10. The "
        "nets trained for each width get a third of the seconds each, and a step of the line runs four networks. The "
        "line is stored twice; with unstructured zeros nothing would be faster.",
    )
