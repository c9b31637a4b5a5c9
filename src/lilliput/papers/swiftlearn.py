"""SwiftLearn: is a subset of the samples that change most worth more seconds than all of them, or any others?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.methods.train.swiftlearn import ImportanceSampler, SwiftLearn, outputs_of
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._equal_seconds import (
    Begin,
    Effort,
    Found,
    Trainee,
    compare,
    endless,
    setup,
    train_for,
    training_set,
)
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import points_over
from lilliput.zoo import nets

paper = Paper(
    title="SwiftLearn: A Data-Efficient Training Method of Deep Learning Models using Importance Sampling",
    authors="Habib Hajimolahoseini, Omar Mohamed Awad, Walid Ahmed, Austin Wen, Saina Asani, Mohammad Hassanpour, "
    "Farnoosh Javadi, Mehdi Ahmadi, Foozhan Ataiefard, Kangling Liu, Yang Liu",
    year=2023,
    arxiv="2311.15134",
    claim="Training on a small subset of samples, chosen by importance after a warm-up and chosen anew from time to "
    "time, is several times faster end to end and loses less than one percent of accuracy.",
    methods=("train.swiftlearn",),
)

OURS, RANDOM, FULL, LOSS = "largest change", "random subset", "all samples", "highest loss"
SETTINGS = SwiftLearn(keep=0.3, warmup=2, refresh=4)
RIVALS = {RANDOM: SETTINGS.with_(score="random", refresh=1_000_000), LOSS: SETTINGS.with_(score="loss")}
BATCH = 64
NOISE = 0.1  # share of wrong labels in the last look at what is chosen


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A small ResNet for the same seconds on 30 % of the samples, chosen in three ways, and on all of them.

    Holds when the samples of the largest change beat, by more than two standard errors over seeds, all samples, a
    random subset of the same size, and the samples of the highest loss. Warm-up and scoring passes are in the time;
    training on all samples has its schedule as short as the others.
    """
    rates = (1e-3, 3e-3, 1e-2)
    effort = Effort(40.0, 5, 20_000, 10_000, rates, 4000) if full else Effort(5.0, 3, 4000, 4000, rates)
    contenders = {OURS: SETTINGS, **RIVALS}
    found = compare({n: beginning(s) for n, s in contenders.items()} | {FULL: begin_full}, effort, seed)
    margins = {rival: points_over(found[OURS], found[rival]) for rival in (FULL, RANDOM, LOSS)}
    noisy = {name: noisy_percent(contenders[name], effort, seed, found[name].rate) for name in (OURS, LOSS)}
    return Evidence(
        setup=setup(
            f"ResNet-8 of width 16, keep {SETTINGS.keep:g}, {SETTINGS.warmup} warm-up passes, a look every "
            f"{SETTINGS.refresh} epochs, AdamW, batches of {BATCH}",
            effort,
            seed,
        ),
        rows=rows_of(found, noisy),
        holds=judge(margins),
        figure="largest change "
        + ", ".join(f"{said(m, 2)} points over {name}" for name, m in margins.items())
        + f"; of {100 * NOISE:g} % wrong labels it chooses {noisy[OURS]:.0f} %, highest loss {noisy[LOSS]:.0f} %",
        limits="Small pictures and a small network from scratch, where the paper fine-tunes BERT; minutes become "
        "seconds. The measure of change is a reconstruction.",
    )


def judge(margins: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`."""
    return all(clearly(margin) for margin in margins.values())


def rows_of(found: dict[str, Found], noisy: dict[str, float]) -> list[Row]:
    """One row per contender; what share of wrong labels ended in the subset stands by those that choose."""
    rows = [one.row(name) for name, one in found.items()]
    for row in rows:
        if row.name in noisy:
            row.values["wrong_labels_chosen_percent"] = noisy[row.name]
    return rows


def network(seed: int) -> nn.Module:
    """Fresh weights by the seed."""
    torch.manual_seed(seed)
    return nets.resnet(16, 8, stem_stride=2)


def choosing(settings: SwiftLearn, data: TensorDataset, seed: int) -> tuple[nn.Module, ImportanceSampler]:
    """A fresh network, and a sampler that scores with it."""
    model = network(seed)
    return model, settings.with_(seed=seed).sampler(data.tensors[1], lambda: outputs_of(model, data))


def beginning(settings: SwiftLearn) -> Begin:
    """A training on the samples that these settings choose."""

    def begin(data: TensorDataset, seed: int, rate: float) -> Trainee:
        model, sampler = choosing(settings, data, seed)
        return trainee(model, DataLoader(data, BATCH, sampler=sampler), rate, sampler)

    return begin


def begin_full(data: TensorDataset, seed: int, rate: float) -> Trainee:
    """A training on everything."""
    order = torch.Generator().manual_seed(seed)
    return trainee(network(seed), DataLoader(data, BATCH, shuffle=True, generator=order), rate)


def trainee(model: nn.Module, loader: DataLoader, rate: float, sampler: ImportanceSampler | None = None) -> Trainee:
    """AdamW on the batches of a loader."""
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05), endless(loader)

    def step(batch: tuple[Tensor, ...]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    def facts() -> dict[str, float]:
        return {"scoring_seconds": sampler.scoring_seconds} if sampler else {}

    return Trainee(model, optimizer, lambda done: next(batches), step, facts)


def noisy_percent(settings: SwiftLearn, effort: Effort, seed: int, rate: float) -> float:
    """Percent of wrong labels in the last subset of a training where NOISE of all labels are."""
    data = training_set(seed, effort.pictures)
    pictures, labels, index = data.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < NOISE
    moved = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    noised = TensorDataset(pictures, torch.where(wrong, moved, labels), index)
    model, sampler = choosing(settings, noised, seed)
    train_for(lambda: trainee(model, DataLoader(noised, BATCH, sampler=sampler), rate), effort.seconds)
    return 100 * float(wrong[sampler.chosen].float().mean())
