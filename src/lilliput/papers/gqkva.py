"""GQKVA: do heads that share queries, keys and values cost less than they save in a vision transformer?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lilliput.methods.layers.gqkva import Gqkva
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_cost import (
    SECONDS,
    STEPS,
    Contender,
    Effort,
    compare,
    faster_steps,
    margin,
    plain,
    times,
)
from lilliput.papers._healed import close, said
from lilliput.papers._low_rank import Effort as Drawn
from lilliput.papers._low_rank import pictures_work
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="GQKVA: Efficient Pre-training of Transformers by Grouping Queries, Keys, and Values",
    authors="Farnoosh Javadi, Walid Ahmed, Habib Hajimolahoseini, Foozhan Ataiefard, Mohammad Hassanpour, Saina Asani, "
    "Austin Wen, Omar Mohamed Awad, Kangling Liu, Yang Liu",
    year=2023,
    arxiv="2311.03426",
    claim="Grouping queries as well as keys and values makes a transformer smaller and its pre-training faster, in "
    "proportion to a small loss of accuracy; multi-head attention is not always the best choice.",
    methods=("layers.gqkva",),
)

FULL, OURS = "multi-head (8, 8)", "grouped queries and states (4, 2)"
MULTI_QUERY, GROUPED = "multi-query (8, 1)", "grouped-query (8, 2)"
NARROWER = "multi-head, narrower feed-forward, as many weights as (4, 2)"
PAIRS = {OURS: (4, 2), GROUPED: (8, 2), MULTI_QUERY: (8, 1)}
FURTHER = {"grouped queries and states (2, 4)": (2, 4), "one query for all heads (1, 8)": (1, 8)}
TOLERATED = 2.0  # points of accuracy that count as a small loss, two standard errors included
SHAPE = {"dim": 64, "layers": 4, "heads": 8, "patch": 7}


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Small vision transformers on Fashion-MNIST from scratch, with (distinct queries, distinct keys and values).

    Holds when (4, 2) is not more than TOLERATED points behind multi-head attention after equally many steps (two
    standard errors included), its training step is faster (whole interval), and after equally many seconds it is not
    behind the multi-head net that has as many weights by narrower feed-forward parts. `full` trains longer, with two
    more pairs.
    """
    effort = Effort(steps=3000, seconds=90, seeds=3, training_samples=48_000) if full else Effort(200, 4.0, 3)
    field = contenders(PAIRS | (FURTHER if full else {}))
    found, models = compare(field, partial(fashion, effort), effort, seed)
    faster = faster_steps(found, models, fashion(effort, seed), OURS, FULL, effort.rounds)
    gains = {(name, way): margin(found, OURS, name, way, True) for name in field for way in (STEPS, SECONDS)}
    smaller = 1 - found[OURS].facts["weights"][0] / found[FULL].facts["weights"][0]
    return Evidence(
        setup=f"vision transformer of {SHAPE}, Fashion-MNIST, batches of 32, {effort.steps} steps and again "
        f"{effort.seconds} s for each, rates {effort.rates} tried; {effort.test_samples} test pictures, {effort.seeds} "
        f"seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name, "accuracy_percent") for name, one in found.items()],
        holds=judge(gains[FULL, STEPS], gains[NARROWER, SECONDS], faster.low),
        figure=f"(4, 2) has {smaller:.0%} fewer weights and trains {times(faster)}; points over multi-head "
        f"{said(gains[FULL, STEPS], 1)} at equal steps, {said(gains[FULL, SECONDS], 1)} at equal seconds; over the "
        f"narrower net {said(gains[NARROWER, STEPS], 1)} and {said(gains[NARROWER, SECONDS], 1)}; over multi-query "
        f"{said(gains[MULTI_QUERY, STEPS], 1)} and {said(gains[MULTI_QUERY, SECONDS], 1)}",
        limits="Nets of 0.2 million weights on 17 tokens of small pictures, trained for minutes at most, where the "
        "paper trains ViT-small on ImageNet. Which query meets which key in the cases between is ours.",
    )


def judge(over_full: tuple[float, float], over_narrower: tuple[float, float], faster_low: float) -> bool:
    """The rule of `experiment`; margins are (points by which ours is better, standard error)."""
    return close(over_full, TOLERATED) and over_narrower[0] >= 0 and faster_low > 1


def contenders(pairs: dict[str, tuple[int, int]]) -> dict[str, Contender]:
    """The plain net, those with grouped heads, and the plain one with narrower feed-forward parts."""

    def grouped(queries: int, states: int) -> Callable[[], nn.Module]:
        method = Gqkva(queries=queries, states=states, init="first")
        return lambda: method.apply(nets.vit(**SHAPE))

    made = {FULL: plain(lambda: nets.vit(**SHAPE)), **{name: plain(grouped(*pair)) for name, pair in pairs.items()}}
    return made | {NARROWER: plain(lambda: nets.vit(**SHAPE, mlp_ratio=3))}


def fashion(effort: Effort, seed: int) -> Workload:
    """Fashion-MNIST in batches of 32, training pictures drawn by the seed."""
    drawn = Drawn(effort.training_samples // 32, effort.test_samples, effort.rounds, 1, batch_size=32)
    return pictures_work(nn.Identity(), seed, drawn)
