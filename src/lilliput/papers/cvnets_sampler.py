"""CVNets: do batches of varying picture size, with as many pictures as fit, train better in the same time?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.methods.train.variable_batch import VariableBatch
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_seconds import (
    Begin,
    Effort,
    Trainee,
    accuracy_percent,
    compare,
    endless,
    setup,
)
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._paired import points_over
from lilliput.zoo import nets
from lilliput.zoo.images import Pictures

paper = Paper(
    title="CVNets: High Performance Library for Computer Vision",
    authors="Sachin Mehta, Farzad Abdolhosseini, Mohammad Rastegari",
    year=2022,
    arxiv="2206.02002",
    claim="A sampler that varies the size of the pictures, and with it the batch, needs fewer updates and less time "
    "than training at one size, at equal or better accuracy.",
    methods=("train.variable_batch",),
)

OURS, FIXED, SAME_BATCH, GROWING = "variable batch", "one size", "sizes, same batch", "growing size"
SETTINGS = VariableBatch(low=0.6, high=1.2, sizes=5, multiple=4)
BASE, BATCH = 28, 64
STAGES = (16, 20, 24, 28)  # sizes of the rival that grows, for a quarter of the time each
ELSEWHERE = (20, 32)  # sizes of test pictures beside the base


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A small ResNet for the same seconds: one size, sizes with one batch size, sizes with fitting batches, growing.

    Holds when the variable batches beat training at one size on test pictures of that size by more than two standard
    errors over seeds, and are not as clearly below a size that grows. Resizing is in the time.
    """
    rates = (3e-3, 1e-2, 3e-2)
    effort = Effort(60.0, 5, 20_000, 10_000, rates, 4000) if full else Effort(5.0, 3, 4000, 2000, rates, 1000)
    contenders: dict[str, Begin] = {
        OURS: beginning(lambda data, seed: of_sizes(SETTINGS, data, seed)),
        SAME_BATCH: beginning(lambda data, seed: of_sizes(SETTINGS.with_(varies=False), data, seed)),
        GROWING: beginning(growing),
        FIXED: beginning(of_one_size),
    }
    found = compare(contenders, effort, seed, elsewhere)
    margins = {rival: points_over(found[OURS], found[rival]) for rival in contenders if rival != OURS}
    return Evidence(
        setup=setup(
            f"ResNet-8 of width 8, sizes {', '.join(str(h) for h, _ in SETTINGS.batches([0], (BASE, BASE), 1).table)}, "
            f"base {BASE}, batches of {BATCH} at the base size, AdamW",
            effort,
            seed,
        ),
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins),
        figure="variable batches " + ", ".join(f"{said(m, 2)} points over {name}" for name, m in margins.items()),
        limits="28-pixel pictures and a small network, where resizing and small layers cost as much as products save; "
        "resized in the training's own process. Sizes come equally often instead of by chance, and the learning rate "
        "does not follow the batch.",
    )


def judge(margins: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; margins are those of the variable batches."""
    return clearly(margins[FIXED]) and matched(margins[GROWING])


Draw = Callable[[float], tuple[Tensor, ...]]


def of_sizes(settings: VariableBatch, data: TensorDataset, seed: int) -> Draw:
    """Batches of the sampler."""
    batches = endless(settings.with_(seed=seed).batches(data, (BASE, BASE), BATCH).loader())
    return lambda done: next(batches)


def of_one_size(data: TensorDataset, seed: int) -> Draw:
    """Ordinary batches."""
    batches = plain(data, seed, BATCH)
    return lambda done: next(batches)


def growing(data: TensorDataset, seed: int) -> Draw:
    """Batches whose pictures grow over the time, as many of them as fit."""
    stages = [plain(data, seed, max(1, round(BATCH * (BASE / size) ** 2))) for size in STAGES]

    def draw(done: float) -> tuple[Tensor, ...]:
        stage = min(int(done * len(STAGES)), len(STAGES) - 1)
        x, *rest = next(stages[stage])
        return (at_size(x, STAGES[stage]), *rest)

    return draw


def plain(data: TensorDataset, seed: int, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled batches without end."""
    return endless(DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)))


def at_size(x: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) at another size, as the sampler resizes them."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def beginning(draws: Callable[[TensorDataset, int], Draw]) -> Begin:
    """A training on batches that are drawn in some way."""

    def begin(data: TensorDataset, seed: int, rate: float) -> Trainee:
        torch.manual_seed(seed)
        model = nets.resnet(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)

        def step(batch: tuple[Tensor, ...]) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

        return Trainee(model, optimizer, draws(data, seed), step)

    return begin


def elsewhere(model: nn.Module, test: Pictures) -> dict[str, float]:
    """Accuracy at other sizes of the test pictures."""
    return {f"accuracy_at_{s}_percent": accuracy_percent(model, test, lambda x, s=s: at_size(x, s)) for s in ELSEWHERE}
