"""Label Refinery: do students that learn what the one before says about the same crop beat those that learn labels?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lilliput.methods.distill._views import ViewedDataset, Views
from lilliput.methods.distill.label_refinery import LabelRefinery
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, said
from lilliput.papers._low_rank import difference
from lilliput.papers._students import BATCH, STUDENTS, Found, Loss, best_rate, built, hard, held_out, labelled, right
from lilliput.zoo import images

paper = Paper(
    title="Label Refinery: Improving ImageNet Classification through Label Progression",
    authors="Hessam Bagherinezhad, Maxwell Horton, Mohammad Rastegari, Ali Farhadi",
    year=2018,
    arxiv="1805.02641",
    claim="Trained on the answers of an earlier network of the same kind to the very same crops, again and again, a "
    "network becomes more accurate than on the labels.",
    methods=("distill.label_refinery",),
)

STUDENT = "ResNet-8"
FIRST, OURS = "first generation (labels)", "last generation (refined labels)"
PLAIN, SMOOTHED = "labels, as long as the chain", "smoothed labels, as long as the chain"
RIVALS = (FIRST, PLAIN, SMOOTHED)
PADDING = 8  # of 28 pixels: crops that may hide half of a picture
NOISE = 0.1  # share of the labels that are drawn at random
SMOOTHING = 0.1
RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    pictures: int
    generations: int
    steps: int  # of each
    seeds: int
    test_pictures: int


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A chain of small ResNets on a few pictures of Fashion-MNIST with wide crops and a tenth of the labels wrong.

    Holds when the last generation is more accurate on untouched test pictures than the first one, and than labels and
    smoothed labels that train as many seconds as the whole chain, by more than two standard errors (paired by
    picture). `full` takes more pictures, generations, steps and seeds.
    """
    effort = Effort(2000, 4, 3000, 5, 10_000) if full else Effort(600, 2, 600, 2, 4000)
    found: dict[str, Found] = {}
    rates = tuned(effort, seed + effort.seeds)
    nats = [compare(found, effort, s, rates) for s in range(seed, seed + effort.seeds)]
    gains = {name: difference(found[OURS].contender(), found[name].contender()) for name in RIVALS}
    points = "; ".join(f"{said(gain, 2)} over {name}" for name, gain in gains.items())
    return Evidence(
        setup=f"{STUDENT}, {effort.pictures} training pictures of Fashion-MNIST moved by up to {PADDING} pixels, "
        f"{NOISE:.0%} of the labels random; {effort.generations} generations of {effort.steps} updates of {BATCH}, "
        f"rate by validation of {RATES}; {effort.test_pictures} test pictures, seeds {seed} to "
        f"{seed + effort.seeds - 1}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains),
        figure=f"points of accuracy of the last of {effort.generations} generations: {points}; its targets have "
        f"{sum(nats) / len(nats):.2f} nats of entropy",
        limits="A small net on few pictures, so that a generation comes near to what labels can give: with 4000 "
        "pictures and three generations of 160 updates, tried first, each was too short, and the chain 12 points "
        "behind labels. Crops are moved pictures, not magnified ones; no refinery of another architecture.",
    )


def judge(gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (points by which ours is better, standard error)."""
    return all(clearly(gains[name]) for name in RIVALS)


def noisy(data: TensorDataset, seed: int) -> TensorDataset:
    """The same pictures, NOISE of the labels drawn at random."""
    pictures, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < NOISE
    return TensorDataset(pictures, torch.where(wrong, torch.randint(10, labels.shape, generator=generator), labels))


def method(effort: Effort, rate: float, seed: int) -> LabelRefinery:
    """The chain of one seed."""
    return LabelRefinery(effort.generations, effort.steps, BATCH, rate, padding=PADDING, seed=seed)


def plain(data: TensorDataset, loss: Loss, seconds: float, rate: float, seed: int) -> tuple[nn.Module, int]:
    """A student that learns labels of the same crops for so long, and its updates."""
    model = built(STUDENTS[STUDENT], seed)
    crops = ViewedDataset(data, Views(PADDING), seed)
    history = crops.learn_(model, loss, BATCH, seed, seconds=seconds, lr=rate)
    return model.eval(), history.steps


LOSSES: dict[str, Loss] = {PLAIN: hard, SMOOTHED: partial(hard, smoothing=SMOOTHING)}


def tuned(effort: Effort, seed: int) -> dict[str, float]:
    """The best learning rate of the chain and of its rivals on validation pictures, by trainings half as long."""
    data = noisy(labelled(images.fashion_mnist()["training"], effort.pictures, seed), seed)
    validation = held_out("validation", effort.test_pictures // 4)
    half = replace(effort, steps=max(effort.steps // 2, 1))
    seconds: list[float] = []

    def chain(rate: float) -> float:
        generations = method(half, rate, seed).refine(STUDENTS[STUDENT], data)
        seconds.append(sum(g.history.seconds for g in generations))
        return float(right(generations[-1].model, validation).mean())

    def rival(loss: Loss, rate: float) -> float:
        return float(right(plain(data, loss, seconds[0], rate, seed)[0], validation).mean())

    return {OURS: best_rate(RATES, chain)} | {n: best_rate(RATES, partial(rival, loss)) for n, loss in LOSSES.items()}


def compare(found: dict[str, Found], effort: Effort, seed: int, rates: dict[str, float]) -> float:
    """Every contender on one seed; the entropy of the last generation's targets in nats."""
    data = noisy(labelled(images.fashion_mnist()["training"], effort.pictures, seed), seed)
    test = held_out("test", effort.test_pictures)
    chain = method(effort, rates[OURS], seed).refine(STUDENTS[STUDENT], data)
    seconds = [generation.history.seconds for generation in chain]
    for name, count in ((FIRST, 1), (OURS, len(chain))):
        last = chain[count - 1].model
        found.setdefault(name, Found()).add(STUDENT, right(last, test), sum(seconds[:count]), count * effort.steps)
    for name, loss in LOSSES.items():
        model, steps = plain(data, loss, sum(seconds), rates[name], seed)
        found.setdefault(name, Found()).add(STUDENT, right(model, test), sum(seconds), steps)
    return chain[-1].target_nats
