"""What the experiments on cheaper vision transformers share: nets from scratch on Fashion-MNIST, each at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lilliput.metrics.latency import Comparison
from lilliput.paper import Row
from lilliput.papers._equal_cost import SECONDS, STEPS, Contender, Effort, Found, compare, faster_steps, margin
from lilliput.papers._healed import close, said
from lilliput.papers._low_rank import Effort as Drawn
from lilliput.papers._low_rank import pictures_work
from lilliput.workload import Workload

BATCH = 32
TOLERATED = 2.0  # points of accuracy that count as a small loss, two standard errors included


@dataclass(frozen=True)
class Race:
    """What was measured of every contender, and what ours gains over the others."""

    found: Mapping[str, Found]
    gains: Mapping[tuple[str, str], tuple[float, float]]  # (rival, STEPS or SECONDS) -> points, standard error
    faster: Comparison  # a training step of ours against the full net's

    def rows(self) -> list[Row]:
        """One row for each contender."""
        return [one.row(name, "accuracy_percent") for name, one in self.found.items()]

    def said(self, rival: str, way: str) -> str:
        """The points that ours gains over a rival, with their standard error."""
        return said(self.gains[rival, way], 1)


def race(field: Mapping[str, Contender], effort: Effort, seed: int, ours: str, full: str) -> Race:
    """Train all contenders in both ways to be equal, and time a training step of ours and of the full net."""
    work_of = partial(fashion, effort)
    found, models = compare(field, work_of, effort, seed)
    faster = faster_steps(found, models, work_of(seed), ours, full, effort.rounds)
    gains = {(name, way): margin(found, ours, name, way, True) for name in field for way in (STEPS, SECONDS)}
    return Race(found, gains, faster)


def judge(over_full: tuple[float, float], over_rivals: Sequence[tuple[float, float]], faster_low: float) -> bool:
    """Whether ours is close to the full net, not behind any rival, and surely faster to train.

    Margins are (points by which ours is better, standard error).
    """
    return close(over_full, TOLERATED) and all(gain >= 0 for gain, _ in over_rivals) and faster_low > 1


def fashion(effort: Effort, seed: int) -> Workload:
    """Fashion-MNIST in batches, training pictures drawn by the seed."""
    drawn = Drawn(effort.training_samples // BATCH, effort.test_samples, effort.rounds, 1, batch_size=BATCH)
    return pictures_work(nn.Identity(), seed, drawn)


def setup(what: str, effort: Effort, seed: int) -> str:
    """What was run, in words."""
    return (
        f"vision transformer of {what}, Fashion-MNIST, batches of {BATCH}, {effort.steps} steps and again "
        f"{effort.seconds} s for each, rates {effort.rates} tried; {effort.test_samples} test pictures, {effort.seeds} "
        f"seeds from {seed}; {torch.get_num_threads()} threads, CPU"
    )
