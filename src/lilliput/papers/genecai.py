"""GeneCAI: evolve pruning rate and rank of every layer, against random, uniform and sensitivity-guided settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from optuna.samplers import RandomSampler

from lilliput.methods.search.genecai import Genecai
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._policies import (
    KEPT,
    PRUNED,
    Effort,
    Genome,
    Point,
    Problem,
    fashion_problem,
    hyper_volume,
    mean_and_spread,
    sampled,
)

paper = Paper(
    title="GeneCAI: Genetic Evolution for Acquiring Compact AI",
    authors="Mojan Javaheripi, Mohammad Samragh, Tara Javidi, Farinaz Koushanfar",
    year=2020,
    arxiv="2004.04249",
    claim="A genetic search over per-layer compression settings finds a better front of accuracy against operations "
    "than rule-based settings and other searches do with as many evaluations.",
    methods=("search.genecai", "prune.channels", "factorize.tucker"),
)

REFERENCE = (50.0, 1.0)  # error in percent, share of the operations: the worst corner of the hyper-volume
LIMITS = (0.6, 0.4, 0.25)  # shares of the operations at which a network is fine-tuned and tested
DEFAULT = Effort(evaluations=75, seeds=3, search_pictures=300, held_pictures=1000, test_pictures=2000, steps=30)
FULL = Effort(evaluations=600, seeds=5, search_pictures=1000, held_pictures=3000, test_pictures=10_000, steps=400)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Four contenders with equal numbers of evaluations on the same pictures."""
    effort = FULL if full else DEFAULT
    problem = fashion_problem(seed, effort)
    return compare(problem, effort, seed)


def compare(problem: Problem, effort: Effort, seed: int) -> Evidence:
    """The evidence; it holds when GeneCAI's mean hyper-volume on pictures no search saw is larger than each rival's by
    more than the larger of the two standard deviations over the seeds (a rival without chance has none)."""
    seeds = range(seed, seed + effort.seeds)
    runs = {
        "random search": [sampled(problem, RandomSampler(seed=s), effort, _losses) for s in seeds],
        "uniform rates": [uniform_rates(problem, effort.evaluations)],
        "greedy sensitivity": [greedy_sensitivity(problem, effort.evaluations)],
        "genecai": [sampled(problem, Genecai().build(s, 2), effort, _losses) for s in seeds],
    }
    volumes = {name: [held_volume(problem, points) for points in group] for name, group in runs.items()}
    rows = [_row(problem, effort, seed, name, runs[name], volumes[name]) for name in runs]
    ours, our_spread = mean_and_spread(volumes["genecai"])
    margins = {n: ours - mean(v) for n, v in volumes.items() if n != "genecai"}
    rival = min(margins, key=lambda n: margins[n])
    holds = all(m > max(our_spread, mean_and_spread(volumes[n])[1]) for n, m in margins.items())
    return Evidence(
        setup=f"resnet-small on Fashion-MNIST, {len(problem.levels)} knobs (channel pruning, Tucker), "
        f"{effort.evaluations} evaluations each on {effort.search_pictures} pictures with batch norms taken anew, "
        f"{effort.held_pictures} others for the hyper-volume, seeds {seeds[0]} to {seeds[-1]}",
        rows=rows,
        holds=holds,
        figure=f"hyper-volume {ours:.3f} ± {our_spread:.3f} against {mean(volumes[rival]):.3f} of {rival}, "
        f"the best of the other three, after {effort.evaluations} evaluations",
        limits="One small network and data set; operations, not milliseconds; the operators' details are "
        f"reconstructed; uniform rates have only {len(PRUNED) * len(KEPT)} different settings; no comparison with "
        "searches that learn by reinforcement.",
    )


def _losses(point: Point) -> tuple[float, float]:
    return 100 - point.accuracy, point.macs


def _row(
    problem: Problem, effort: Effort, seed: int, name: str, runs: Sequence[list[Point]], volumes: list[float]
) -> Row:
    """Hyper-volume over the seeds, and the test accuracy of the first run's networks under three limits."""
    volume, spread = mean_and_spread(volumes)
    values = {"hyper_volume": volume, "evaluations": float(mean(len(r) for r in runs))}
    for limit in LIMITS:
        within = [p for p in runs[0] if p.macs <= limit]
        if within:
            best = max(within, key=lambda p: p.accuracy)
            tuned = problem.tuned_accuracy(best.genome, effort.steps, seed)
            values[f"test_accuracy_at_{limit:.0%}_macs_percent"] = tuned
    return Row(name, values, {"hyper_volume": spread})


def held_volume(problem: Problem, points: Sequence[Point]) -> float:
    """Hyper-volume of the front that a search found, with its accuracies measured on pictures it did not see."""
    front = [p for p in points if not any(_dominates(q, p) for q in points)]
    genomes = {p.genome: p.macs for p in front if 100 - p.accuracy < REFERENCE[0]}
    return hyper_volume([(100 - problem.held_accuracy(g), macs) for g, macs in genomes.items()], REFERENCE)


def _dominates(a: Point, b: Point) -> bool:
    x, y = _losses(a), _losses(b)
    return x != y and x[0] <= y[0] and x[1] <= y[1]


def uniform_rates(problem: Problem, evaluations: int) -> list[Point]:
    """One rate and one rank for all layers: every pair of levels, the diagonal of equal strengths first."""
    grid = [(i / (len(PRUNED) - 1), j / (len(KEPT) - 1)) for i in range(len(PRUNED)) for j in range(len(KEPT))]
    grid.sort(key=lambda pair: abs(pair[0] - pair[1]))
    return [problem.evaluate(problem.uniform(*pair)) for pair in grid[:evaluations]]


def greedy_sensitivity(problem: Problem, evaluations: int) -> list[Point]:
    """Measure every knob alone, then strengthen step by step the one that should cost least for what it saves.

    Damages are taken to add up; what is left of the evaluations is spent evenly along the path.
    """
    dense = (0,) * len(problem.levels)
    base = problem.evaluate(dense)
    alone, points = one_at_a_time(problem, evaluations * 4 // 5), [base]
    points += [p for p in alone.values() if p.genome != dense]
    path = greedy_path(problem.levels, lambda k, g: _effect(alone, base, k, g))
    left = max(evaluations - len(points), 1)
    picked = [path[round(i * (len(path) - 1) / left)] for i in range(1, left + 1)]
    return (points + [problem.evaluate(g) for g in dict.fromkeys(picked)])[:evaluations]


def one_at_a_time(problem: Problem, evaluations: int) -> dict[tuple[int, int], Point]:
    """(knob, level) -> the network with only that; with few evaluations the strongest levels and the middle ones."""
    steps = [(k, g) for k, n in enumerate(problem.levels) for g in range(1, n)]
    order = sorted(steps, key=lambda s: (s[1] != problem.levels[s[0]] - 1, s[1] != problem.levels[s[0]] // 2))
    size = len(problem.levels)
    return {(k, g): problem.evaluate((0,) * k + (g,) + (0,) * (size - k - 1)) for k, g in order[:evaluations]}


def _effect(alone: dict[tuple[int, int], Point], base: Point, knob: int, level: int) -> tuple[float, float]:
    """(lost accuracy, saved operations) of one knob, on a line between the levels that were measured."""
    known = sorted((g, p) for (k, g), p in alone.items() if k == knob)
    marks = [(0, 0.0, 0.0), *((g, base.accuracy - p.accuracy, base.macs - p.macs) for g, p in known)]
    below = max((m for m in marks if m[0] <= level), key=lambda m: m[0])
    above = min((m for m in marks if m[0] >= level), key=lambda m: m[0], default=below)
    share = 0.0 if above[0] == below[0] else (level - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1]), below[2] + share * (above[2] - below[2])


def greedy_path(levels: Sequence[int], effect: Callable[[int, int], tuple[float, float]]) -> list[Genome]:
    """From no compression to full, at each step the knob with the least damage for each operation it saves."""
    genome, path = [0] * len(levels), [(0,) * len(levels)]
    while any(g < n - 1 for g, n in zip(genome, levels)):

        def price(k: int) -> float:
            before, after = effect(k, genome[k]), effect(k, genome[k] + 1)
            return (after[0] - before[0]) / max(after[1] - before[1], 1e-6)

        best = min((k for k, n in enumerate(levels) if genome[k] < n - 1), key=price)
        genome[best] += 1
        path.append(tuple(genome))
    return path
