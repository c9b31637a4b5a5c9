"""Dataset reinforcement: do stored answers of a teacher make better students than labels, at the cost of labels?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lilliput.methods.distill._views import ViewedDataset
from lilliput.methods.distill.dataset_reinforcement import DatasetReinforcement, ReinforcedDataset
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._low_rank import difference
from lilliput.papers._students import (
    BATCH,
    STUDENTS,
    Found,
    Loss,
    best_rate,
    built,
    hard,
    held_out,
    labelled,
    online,
    right,
    stored,
)
from lilliput.zoo import images, nets

paper = Paper(
    title="Reinforce Data, Multiply Impact: Improved Model Accuracy and Robustness with Dataset Reinforcement",
    authors="Fartash Faghri, Hadi Pouransari, Sachin Mehta, Mehrdad Farajtabar, Ali Farhadi, Mohammad Rastegari, "
    "Oncel Tuzel",
    year=2023,
    arxiv="2303.08983",
    claim="A dataset that once got a teacher's answers to many views of its pictures trains better students of any "
    "architecture than its labels do, at no additional training cost.",
    methods=("distill.dataset_reinforcement",),
)

OURS = "stored answers"
PLAIN, SMOOTHED, ONLINE = "labels", "smoothed labels", "teacher asked while training"
ALL_PAID = "labels, given the whole time of storing too"
RIVALS = (PLAIN, SMOOTHED)
METHOD = DatasetReinforcement(samples=4, top_k=5, padding=2, erase=0.25)
SMOOTHING = 0.1
RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    pictures: int
    seconds: float  # of a student's training
    seeds: int
    test_pictures: int


@dataclass(frozen=True)
class Setting:
    """What all contenders of one seed share."""

    data: TensorDataset
    file: Path
    storing_s: float
    teacher: nn.Module

    def contender(self, name: str) -> tuple[ViewedDataset, Loss]:
        """The data and the loss of a contender."""
        views = ViewedDataset(self.data, METHOD.views, METHOD.seed)
        losses: dict[str, Loss] = {
            PLAIN: hard,
            ALL_PAID: hard,
            SMOOTHED: partial(hard, smoothing=SMOOTHING),
            ONLINE: partial(online, teacher=self.teacher),
        }
        return (ReinforcedDataset(self.data, self.file), stored) if name == OURS else (views, losses[name])


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Students of two architectures on few pictures of Fashion-MNIST, all with the same views, at equal seconds.

    The seconds of storing are shared by the students that use it, and every rival trains by that share longer; one
    more is given all of them. Holds when the stored answers beat labels and smoothed labels on both architectures by
    more than two standard errors (paired by picture), and are not worse, by more than two, than the teacher that is
    asked while training. `full` takes more pictures, seconds and seeds.
    """
    effort = Effort(10_000, 30.0, 3, 10_000) if full else Effort(2500, 2.5, 2, 4000)
    found: dict[str, Found] = {}
    storing: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rates = tuned(prepared(effort, seed + effort.seeds, Path(folder)), effort)
        for s in range(seed, seed + effort.seeds):
            setting = prepared(effort, s, Path(folder))
            storing.append(setting.storing_s)
            compare(found, setting, effort, s, rates)
        size_bytes = setting.file.stat().st_size
    gains = {
        (name, student): difference(found[OURS].contender(student), found[name].contender(student))
        for name in (*RIVALS, ONLINE, ALL_PAID)
        for student in STUDENTS
    }
    whole = {name: difference(found[OURS].contender(), found[name].contender()) for name in (*RIVALS, ONLINE, ALL_PAID)}
    rows = [one.row(name) for name, one in found.items()]
    next(row for row in rows if row.name == OURS).values["file_bytes_per_picture"] = size_bytes / effort.pictures
    points = "; ".join(f"{said(gain, 2)} over {name}" for name, gain in whole.items())
    return Evidence(
        setup=f"{effort.pictures} training pictures of Fashion-MNIST, teacher resnet-small, {METHOD.samples} views of "
        f"each stored in {sum(storing) / len(storing):.1f} s; {' and '.join(STUDENTS)} trained {effort.seconds} s, "
        f"rivals longer by the share of storing; rate by validation of {RATES}; {effort.test_pictures} test pictures, "
        f"seeds {seed} to {seed + effort.seeds - 1}; {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(gains),
        figure=f"points of accuracy of stored answers, mean of {len(STUDENTS)} architectures: {points}",
        limits="The teacher has learned from 55,000 pictures, the students see a few thousand, and its own training is "
        "not counted. Small pictures and nets, seconds instead of hours, four views where the paper has hundreds; no "
        "changes of colour or size.",
    )


def judge(gains: dict[tuple[str, str], tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (points that ours is better, standard error) by rival and architecture."""
    better = all(clearly(gains[name, student]) for name in RIVALS for student in STUDENTS)
    return better and all(matched(gains[ONLINE, student]) for student in STUDENTS)


def prepared(effort: Effort, seed: int, folder: Path) -> Setting:
    """Pictures drawn by the seed and the teacher's answers to them; the seconds that storing took."""
    data = labelled(images.fashion_mnist()["training"], effort.pictures, seed)
    teacher = nets.load("resnet-small")
    start = perf_counter()
    file = METHOD.reinforce(data, teacher, folder / f"{seed}.safetensors")
    return Setting(data, file, perf_counter() - start, teacher)


def tuned(setting: Setting, effort: Effort) -> dict[tuple[str, str], float]:
    """The best learning rate of every contender and architecture on validation pictures, by shorter trainings."""
    validation = held_out("validation", effort.test_pictures // 4)

    def score(name: str, make: Callable[[], nn.Module], rate: float) -> float:
        model, _ = trained(setting, name, make, effort.seconds / 2, rate, seed=99)
        return float(right(model, validation).mean())

    rates = {
        (name, student): best_rate(RATES, partial(score, name, make))
        for name in (OURS, *RIVALS, ONLINE)
        for student, make in STUDENTS.items()
    }
    return rates | {(ALL_PAID, student): rates[PLAIN, student] for student in STUDENTS}


def trained(
    setting: Setting, name: str, make: Callable[[], nn.Module], seconds: float, rate: float, seed: int
) -> tuple[nn.Module, int]:
    """A student and its number of updates."""
    data, loss = setting.contender(name)
    model = built(make, seed)
    history = data.learn_(model, loss, BATCH, seed, seconds=seconds, lr=rate)
    return model.eval(), history.steps


def compare(
    found: dict[str, Found], setting: Setting, effort: Effort, seed: int, rates: dict[tuple[str, str], float]
) -> None:
    """Every contender and architecture on one seed; each student of ours pays its share of storing."""
    test = held_out("test", effort.test_pictures)
    share = setting.storing_s / len(STUDENTS)
    allowed = {OURS: effort.seconds, ALL_PAID: effort.seconds + setting.storing_s}
    for name in (PLAIN, SMOOTHED, ONLINE, ALL_PAID, OURS):
        for student, make in STUDENTS.items():
            seconds = allowed.get(name, effort.seconds + share)
            model, steps = trained(setting, name, make, seconds, rates[name, student], seed)
            paid = seconds + (share if name == OURS else 0.0)
            found.setdefault(name, Found()).add(student, right(model, test), paid, steps)
