"""SkipViT: does a vision transformer train faster when the tokens that matter least skip blocks, at equal accuracy?"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lilliput.methods.tokens.skipvit import SkipViT
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_cost import SECONDS, STEPS, Contender, Effort, plain, times
from lilliput.papers._vision_cost import judge, race, setup
from lilliput.zoo import nets

paper = Paper(
    title="SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection",
    authors="Foozhan Ataiefard, Walid Ahmed, Habib Hajimolahoseini, Saina Asani, Farnoosh Javadi, Mohammad Hassanpour, "
    "Omar Mohamed Awad, Austin Wen, Kangling Liu, Yang Liu",
    year=2024,
    arxiv="2401.15293",
    claim="When the tokens that the class token looks at least skip the middle blocks and come back, a vision "
    "transformer trains faster from scratch at the accuracy of the full one.",
    methods=("tokens.skipvit",),
)

FULL, OURS, SMALLER = "all tokens", "unimportant tokens skip", "all tokens, one block fewer"
RANDOM = "random tokens skip in training, all serve"
DROPPED = "unimportant tokens dropped for good"
SHAPE = {"dim": 32, "heads": 4, "patch": 4}
LAYERS = 6


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Small vision transformers on Fashion-MNIST from scratch; 55 % of the tokens skip two of six blocks.

    Holds when a training step is faster than with all tokens (whole interval), the accuracy after equally many steps is
    not more than TOLERATED points lower (two standard errors included), and after equally many seconds it is not below
    those of random skipping and of a net with one block fewer. `full` trains longer and adds tokens that never return.
    """
    effort = Effort(steps=3000, seconds=120, seeds=3, training_samples=48_000) if full else Effort(120, 5.0, 3)
    field = contenders() | ({DROPPED: plain(skipping(SkipViT(end=1.0)))} if full else {})
    ran = race(field, effort, seed, OURS, FULL)
    rivals = [ran.gains[name, SECONDS] for name in (RANDOM, SMALLER)]
    return Evidence(
        setup=setup(f"{LAYERS} layers, {SHAPE}", effort, seed),
        rows=ran.rows(),
        holds=judge(ran.gains[FULL, STEPS], rivals, ran.faster.low),
        figure=f"a training step {times(ran.faster)}; points over all tokens {ran.said(FULL, STEPS)} at equal steps, "
        f"{ran.said(FULL, SECONDS)} at equal seconds; over random skipping {ran.said(RANDOM, SECONDS)}, over one block "
        f"fewer {ran.said(SMALLER, SECONDS)} at equal seconds",
        limits="Nets of 0.08 million weights on 50 tokens of small pictures, trained for minutes at most, where the "
        "paper trains ViT-small on ImageNet. Which blocks are skipped is ours.",
    )


def skipping(method: SkipViT) -> Callable[[], nn.Module]:
    """The net with skipped blocks, untrained."""
    return lambda: method.apply(nets.vit(**SHAPE, layers=LAYERS))


def contenders() -> dict[str, Contender]:
    """All tokens, unimportant or random ones skipping, and a net with a block fewer."""
    return {
        FULL: plain(lambda: nets.vit(**SHAPE, layers=LAYERS)),
        OURS: plain(skipping(SkipViT())),
        RANDOM: plain(skipping(SkipViT(score="random", serving="all"))),
        SMALLER: plain(lambda: nets.vit(**SHAPE, layers=LAYERS - 1)),
    }
