"""SkipViT: does a vision transformer train faster when the tokens that matter least skip blocks, at equal accuracy?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lilliput.methods.tokens.skipvit import SkipViT
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
from lilliput.papers.gqkva import fashion
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
TOLERATED = 2.0  # points of accuracy that count as the same, two standard errors included
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
    found, models = compare(field, partial(fashion, effort), effort, seed)
    faster = faster_steps(found, models, fashion(effort, seed), OURS, FULL, effort.rounds)
    gains = {(name, way): margin(found, OURS, name, way, True) for name in field for way in (STEPS, SECONDS)}
    rivals = [gains[name, SECONDS] for name in (RANDOM, SMALLER)]
    return Evidence(
        setup=f"vision transformer of {LAYERS} layers, {SHAPE}, Fashion-MNIST, batches of 32, {effort.steps} steps and "
        f"again {effort.seconds} s for each, rates {effort.rates} tried; {effort.test_samples} test pictures, "
        f"{effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name, "accuracy_percent") for name, one in found.items()],
        holds=judge(gains[FULL, STEPS], rivals, faster.low),
        figure=f"a training step {times(faster)}; points over all tokens {said(gains[FULL, STEPS], 1)} at equal steps, "
        f"{said(gains[FULL, SECONDS], 1)} at equal seconds; over random skipping {said(gains[RANDOM, SECONDS], 1)}, "
        f"over one block fewer {said(gains[SMALLER, SECONDS], 1)} at equal seconds",
        limits="Nets of 0.08 million weights on 50 tokens of small pictures, trained for minutes at most, where the "
        "paper trains ViT-small on ImageNet. Which blocks are skipped is ours.",
    )


def judge(over_full: tuple[float, float], over_rivals: list[tuple[float, float]], faster_low: float) -> bool:
    """The rule of `experiment`; margins are (points by which ours is better, standard error)."""
    return close(over_full, TOLERATED) and all(gain >= 0 for gain, _ in over_rivals) and faster_low > 1


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
