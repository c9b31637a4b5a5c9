"""ASCAI: adaptive sampling for the smallest network above an accuracy floor, against simple and strong rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

import numpy as np
from optuna.samplers import RandomSampler

from lilliput.methods.search.ascai import Ascai, floor_score
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._policies import Effort, Genome, Point, Problem, fashion_problem, mean_and_spread, sampled

paper = Paper(
    title="ASCAI: Adaptive Sampling for acquiring Compact AI",
    authors="Mojan Javaheripi, Mohammad Samragh, Tara Javidi, Farinaz Koushanfar",
    year=2019,
    arxiv="1911.06471",
    claim="Sampling per-layer settings adaptively, with operations borrowed from genetic search on plain vectors, "
    "gives smaller networks at the same accuracy than rule-based settings and other searches.",
    methods=("search.ascai", "prune.channels", "factorize.tucker"),
)

FLOOR = 1.0  # points of accuracy that may be lost, on the pictures of the search
TEMPERATURE = 0.25  # points of accuracy below the floor at which the score falls to 1 / e (reconstructed)
DEFAULT = Effort(evaluations=48, seeds=3, search_pictures=300, held_pictures=1000, test_pictures=2000, steps=30)
FULL = Effort(evaluations=500, seeds=5, search_pictures=1000, held_pictures=3000, test_pictures=10_000, steps=400)

Search = Callable[[Problem, Effort, Callable[[Point], float], int], list[Point]]


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Five contenders with at most equal numbers of evaluations on the same pictures."""
    effort = FULL if full else DEFAULT
    return compare(fashion_problem(seed, effort), effort, seed)


def compare(problem: Problem, effort: Effort, seed: int) -> Evidence:
    """The evidence; it holds when ASCAI's mean saving at the floor is larger than each rival's by more than the larger
    of the two standard deviations over the seeds, and its networks lose at most 2 points on pictures no search saw."""
    dense, start = problem.evaluate((0,) * len(problem.levels)), time.perf_counter()
    score = partial(point_score, floor=dense.accuracy - FLOOR)
    seeds = range(seed, seed + effort.seeds)
    runs = {name: [search(problem, effort, score, s) for s in seeds] for name, search in CONTENDERS.items()}
    evaluated = len({p.genome for group in runs.values() for points in group for p in points})
    seconds = (time.perf_counter() - start) / max(evaluated, 1)
    floor, held_dense = dense.accuracy - FLOOR, problem.held_accuracy(dense.genome)
    rows = [_row(problem, effort, seed, name, group, floor, held_dense) for name, group in runs.items()]
    saved = {r.name: (r.values["saved_weights_share"], r.spread["saved_weights_share"]) for r in rows}
    ours, spread = saved.pop("ascai")
    rival = max(saved, key=lambda n: saved[n][0])
    lost = next(r for r in rows if r.name == "ascai").values["lost_on_held_points"]
    return Evidence(
        setup=f"resnet-small on Fashion-MNIST, {len(problem.levels)} knobs (channel pruning, Tucker), at most "
        f"{effort.evaluations} evaluations each on {effort.search_pictures} pictures with batch norms taken anew "
        f"({seconds:.2f} s each), floor {FLOOR} points below the original's {dense.accuracy:.1f} %, "
        f"seeds {seeds[0]} to {seeds[-1]}",
        rows=rows,
        holds=all(ours - m > max(spread, s) for m, s in saved.values()) and lost <= 2.0,
        figure=f"{ours:.1%} ± {spread:.1%} of the weights saved within {FLOOR} point of accuracy, against "
        f"{saved[rival][0]:.1%} of {rival}, the best of the other four, after {effort.evaluations} evaluations",
        limits="One small network and data set; the score's form and the shares of the proposals are reconstructed; "
        "accuracy is that before fine-tuning, on few pictures, so that about a point of it is noise; the evolution "
        "strategy has a diagonal covariance.",
    )


def _row(
    problem: Problem, effort: Effort, seed: int, name: str, runs: Sequence[list[Point]], floor: float, held: float
) -> Row:
    """What was saved at the floor over the seeds, half way and at the end, and what it cost on other pictures."""
    ends = [smallest(points, floor) for points in runs]
    half = [smallest(points[: effort.evaluations // 2], floor) for points in runs]
    saved, spread = mean_and_spread([1 - p.size for p in ends])
    values = {
        "saved_weights_share": saved,
        "saved_weights_share_half_way": mean(1 - p.size for p in half),
        "lost_on_held_points": held - mean(problem.held_accuracy(p.genome) for p in ends),
        "test_accuracy_tuned_percent": problem.tuned_accuracy(ends[0].genome, effort.steps, seed),
        "evaluations": float(mean(len(points) for points in runs)),
    }
    return Row(name, values, {"saved_weights_share": spread})


def point_score(point: Point, floor: float) -> float:
    """ASCAI's score: the share of weights saved, cut down steeply below the floor."""
    return floor_score(1 - point.size, point.accuracy, floor, TEMPERATURE)


def smallest(points: Sequence[Point], floor: float) -> Point:
    """The smallest network that reaches the floor; the most accurate one if none does, counted as saving nothing."""
    good = [p for p in points if p.accuracy >= floor]
    if good:
        return min(good, key=lambda p: p.size)
    best = max(points, key=lambda p: p.accuracy)
    return Point(best.genome, best.accuracy, 1.0, 1.0)


# --- contenders ------------------------------------------------------------------------------------------------


def random_search(problem: Problem, effort: Effort, score: Callable[[Point], float], seed: int) -> list[Point]:
    """Uniform over all knobs."""
    return sampled(problem, RandomSampler(seed=seed), effort, lambda p: (-score(p),))


def adaptive(problem: Problem, effort: Effort, score: Callable[[Point], float], seed: int) -> list[Point]:
    """ASCAI."""
    return sampled(problem, Ascai().build(seed), effort, lambda p: (-score(p),))


def bisection(problem: Problem, effort: Effort, score: Callable[[Point], float], seed: int) -> list[Point]:
    """One strength for all layers, halved towards the floor: pruning and factoring together, then each alone."""
    points: list[Point] = []
    for rate, rank in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        low, high = 0.0, 1.0
        for _ in range(5):
            middle = (low + high) / 2
            points.append(problem.evaluate(problem.uniform(middle * rate, middle * rank)))
            good = score(points[-1]) >= 1 - points[-1].size  # nothing was taken off the score: above the floor
            low, high = (middle, high) if good else (low, middle)
    return points[: effort.evaluations]


def coordinate_descent(problem: Problem, effort: Effort, score: Callable[[Point], float], seed: int) -> list[Point]:
    """From the original, one knob after the other in random order a level further, kept when the score rises."""
    rng = np.random.default_rng(seed)
    genome: Genome = (0,) * len(problem.levels)
    points = [problem.evaluate(genome)]
    while len(points) < effort.evaluations:
        moved = False
        for k in rng.permutation(len(genome)):
            if genome[k] + 1 < problem.levels[k] and len(points) < effort.evaluations:
                points.append(problem.evaluate((*genome[:k], genome[k] + 1, *genome[k + 1 :])))
                if score(points[-1]) > score(problem.evaluate(genome)):
                    genome, moved = points[-1].genome, True
        if not moved:
            break
    return points


def evolution_strategy(problem: Problem, effort: Effort, score: Callable[[Point], float], seed: int) -> list[Point]:
    """CMA-like: a Gaussian with diagonal covariance, moved towards the better half of each batch and fitted to it."""
    rng, n = np.random.default_rng(seed), np.array(problem.levels)
    batch = 4 + int(3 * np.log(len(n)))
    weights = np.log(batch / 2 + 0.5) - np.log(np.arange(1, batch // 2 + 1))
    weights /= weights.sum()
    centre, deviation, points = np.full(len(n), 0.5), np.full(len(n), 0.3), []
    while len(points) < effort.evaluations:
        drawn = np.clip(centre + deviation * rng.standard_normal((batch, len(n))), 0, 1)
        found = [problem.evaluate(tuple(int(g) for g in np.minimum(x * n, n - 1))) for x in drawn]
        points += found
        best = drawn[np.argsort([-score(p) for p in found], kind="stable")[: batch // 2]]
        variance = (weights[:, None] * (best - centre) ** 2).sum(0)
        centre = (weights[:, None] * best).sum(0)
        deviation = np.sqrt(0.7 * deviation**2 + 0.3 * variance)
    return points[: effort.evaluations]


CONTENDERS: dict[str, Search] = {
    "random search": random_search,
    "uniform bisection": bisection,
    "coordinate descent": coordinate_descent,
    "CMA-like": evolution_strategy,
    "ascai": adaptive,
}
