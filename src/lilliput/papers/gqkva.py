"""GQKVA: do heads that share queries, keys and values cost less than they save in a vision transformer?"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lilliput.methods.layers.gqkva import Gqkva
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_cost import SECONDS, STEPS, Contender, Effort, plain, times
from lilliput.papers._vision_cost import judge, race, setup
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
    ran = race(field, effort, seed, OURS, FULL)
    smaller = 1 - ran.found[OURS].facts["weights"][0] / ran.found[FULL].facts["weights"][0]
    return Evidence(
        setup=setup(str(SHAPE), effort, seed),
        rows=ran.rows(),
        holds=judge(ran.gains[FULL, STEPS], [ran.gains[NARROWER, SECONDS]], ran.faster.low),
        figure=f"(4, 2) has {smaller:.0%} fewer weights and trains {times(ran.faster)}; points over multi-head "
        f"{ran.said(FULL, STEPS)} at equal steps, {ran.said(FULL, SECONDS)} at equal seconds; over the narrower net "
        f"{ran.said(NARROWER, STEPS)} and {ran.said(NARROWER, SECONDS)}; over multi-query "
        f"{ran.said(MULTI_QUERY, STEPS)} and {ran.said(MULTI_QUERY, SECONDS)}",
        limits="Nets of 0.2 million weights on 17 tokens of small pictures, trained for minutes at most, where the "
        "paper trains ViT-small on ImageNet. Which query meets which key in the cases between is ours.",
    )


def contenders(pairs: dict[str, tuple[int, int]]) -> dict[str, Contender]:
    """The plain net, those with grouped heads, and the plain one with narrower feed-forward parts."""

    def grouped(queries: int, states: int) -> Callable[[], nn.Module]:
        method = Gqkva(queries=queries, states=states, init="first")
        return lambda: method.apply(nets.vit(**SHAPE))

    made = {FULL: plain(lambda: nets.vit(**SHAPE)), **{name: plain(grouped(*pair)) for name, pair in pairs.items()}}
    return made | {NARROWER: plain(lambda: nets.vit(**SHAPE, mlp_ratio=3))}
