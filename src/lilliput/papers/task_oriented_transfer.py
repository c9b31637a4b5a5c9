"""Task-oriented transfer: is a small model with few labels best taught by a large one adapted to its task?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lilliput.methods.distill.task_oriented_transfer import Head, TaskOrientedTransfer, features_of, retrieve
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, matched, said
from lilliput.papers._low_rank import difference
from lilliput.papers._students import BATCH, STUDENTS, Found, best_rate, built, held_out, right
from lilliput.training import train
from lilliput.workload import Batch
from lilliput.zoo import images
from lilliput.zoo.images import IMAGENET_MEAN, IMAGENET_STD, Normalize

paper = Paper(
    title="Knowledge Transfer from Vision Foundation Models for Efficient Training of Small Task-specific Models",
    authors="Raviteja Vemulapalli, Hadi Pouransari, Fartash Faghri, Sachin Mehta, Mehrdad Farajtabar, "
    "Mohammad Rastegari, Oncel Tuzel",
    year=2024,
    arxiv="2311.18237",
    claim="With few labels, a small model learns a task best from a large model that was first adapted to that task "
    "and then answers unlabelled pictures; better than from the large model's features, and from retrieved pictures "
    "better than from random ones.",
    methods=("distill.task_oriented_transfer",),
)

STUDENT = "ResNet-8"
OURS, RANDOM = "answers to retrieved pictures", "answers to random pictures"
WHOLE = "answers to the whole gallery"
AGNOSTIC, PSEUDO, SCRATCH = "features of retrieved pictures", "classes of retrieved pictures", "labels alone"
TEACHER = "large model with a head"
CONTENDERS = (OURS, RANDOM, WHOLE, AGNOSTIC, PSEUDO, SCRATCH)
BEATEN, MATCHED = (AGNOSTIC, SCRATCH, RANDOM), (PSEUDO, WHOLE)
SIZE = 96  # pixels that the large model sees
RATES = (3e-3, 1e-2)
PREPARE = Normalize(0.2860, 0.3530)  # of Fashion-MNIST, for all pictures


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    gallery: int  # pictures of each of two data sets
    retrieved: int
    per_class: int  # labels
    steps: int
    tuning_steps: int
    seeds: int
    test_pictures: int


class Foundation(nn.Module):
    """MobileNetV2 with its ImageNet weights up to the pooling: prepared grey pictures (B, 1, 28, 28) -> (B, 1280)."""

    def __init__(self):
        super().__init__()
        self.net = images.load_mobilenet_v2()

    def forward(self, x: Tensor) -> Tensor:
        grey = F.interpolate(x * PREPARE.std + PREPARE.mean, (SIZE, SIZE), mode="bilinear")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return self.net.features((grey - mean) / std).mean((2, 3))


@dataclass(frozen=True)
class Gallery:
    """Unlabelled pictures, their features, and the seconds that one took the large model."""

    pictures: Tensor
    features: Tensor
    seconds_each: float


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Ten kinds of clothes from a few labels each, a gallery of clothes and digits, and an ImageNet model.

    Rivals get as many updates, and labels alone as many seconds as ours with the large model's passes. Holds when ours
    beats features, labels alone and random pictures by more than two standard errors (paired by picture), and is not
    worse, by more than two, than learning the large model's classes without its doubts, and than its answers to the
    whole gallery, which cost the same. `full` has more of everything.
    """
    effort = Effort(6000, 5000, 10, 2000, 300, 5, 10_000) if full else Effort(1000, 800, 10, 250, 50, 3, 4000)
    foundation, test = Foundation().eval(), held_out("test", effort.test_pictures)
    gallery = gathered(foundation, effort)
    rates = tuned(foundation, gallery, effort, seed + effort.seeds)
    found: dict[str, Found] = {}
    relevant: list[float] = []
    for s in range(seed, seed + effort.seeds):
        relevant.append(compare(found, foundation, gallery, effort, s, rates, test))
    some = TensorDataset(*(part[: effort.test_pictures // 4] for part in test.tensors))
    head = Head.fitted(*labelled_features(foundation, few_labels(effort, seed)), TaskOrientedTransfer().decay)
    found[TEACHER] = Found()
    found[TEACHER].add(STUDENT, right(nn.Sequential(foundation, head), some), 0.0, 0)
    gains = {n: difference(found[OURS].contender(), found[n].contender()) for n in (*BEATEN, *MATCHED)}
    points = "; ".join(f"{said(gain, 1)} over {name}" for name, gain in gains.items())
    return Evidence(
        setup=f"{STUDENT}, {effort.per_class} labels of each of 10 classes of Fashion-MNIST, MobileNetV2 (ImageNet) at "
        f"{SIZE} pixels with a linear head; {effort.retrieved} of {2 * effort.gallery} unlabelled pictures (half "
        f"digits), {effort.steps} + {effort.tuning_steps} updates of {BATCH}, rate by validation of {RATES}; "
        f"{effort.test_pictures} test pictures, {effort.seeds} draws of labels from seed {seed}; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains),
        figure=f"points of accuracy of the small model: {points}; {sum(relevant) / len(relevant):.0%} of the retrieved "
        "pictures are of the task",
        limits="A MobileNetV2 of 2018 stands for a foundation model, and only its head is adapted. One task with small "
        "grey pictures, a gallery of two data sets; learning rates are chosen with more labels than the task has.",
    )


def judge(gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (points by which ours is better, standard error)."""
    return all(clearly(gains[name]) for name in BEATEN) and all(matched(gains[name]) for name in MATCHED)


def gathered(foundation: nn.Module, effort: Effort) -> Gallery:
    """As many clothes, of which none is ever labelled, as digits; and their features."""
    clothes = images.fashion_mnist()["training"].first(effort.gallery)
    digits = images.digits()["training"].first(effort.gallery)
    pictures = PREPARE(torch.cat([clothes.pixels, digits.pixels]))
    start = perf_counter()
    features = features_of(foundation, pictures)
    return Gallery(pictures, features, (perf_counter() - start) / len(pictures))


def few_labels(effort: Effort, seed: int) -> Batch:
    """`per_class` labelled pictures of each class, drawn by the seed from training pictures outside of the gallery."""
    pictures = images.fashion_mnist()["training"]
    order = torch.randperm(len(pictures) - effort.gallery, generator=torch.Generator().manual_seed(seed))
    order = order + effort.gallery
    picks = torch.cat([order[pictures.labels[order] == c][: effort.per_class] for c in range(10)])
    return {"input": PREPARE(pictures.pixels[picks]), "label": pictures.labels[picks]}


def labelled_features(foundation: nn.Module, labelled: Batch) -> tuple[Tensor, Tensor]:
    """Features and labels of the labelled pictures."""
    return features_of(foundation, labelled["input"]), labelled["label"]


def compare(
    found: dict[str, Found],
    foundation: nn.Module,
    gallery: Gallery,
    effort: Effort,
    seed: int,
    rates: dict[str, float],
    test: TensorDataset,
) -> float:
    """Every contender on one draw of labels; the share of retrieved pictures that are of the task."""
    start, seconds = perf_counter(), 0.0
    task = drawn(foundation, gallery, effort, seed)
    prepared = perf_counter() - start
    for name in CONTENDERS:
        start = perf_counter()
        model, updates = taught(name, task, effort, rates[name], seed, seconds)
        took = perf_counter() - start
        if name != SCRATCH:
            asked = effort.retrieved if name == RANDOM else len(gallery.pictures)
            took += prepared + asked * gallery.seconds_each
        seconds = seconds or took
        found.setdefault(name, Found()).add(STUDENT, right(model, test), took, updates)
    return float((task.picks < effort.gallery).double().mean())


@dataclass(frozen=True)
class Task:
    """One draw of labels: with the large model's head for it, and what of the gallery was chosen."""

    labelled: Batch
    head: Head
    gallery: Gallery
    picks: Tensor  # retrieved rows of the gallery
    others: Tensor  # as many random ones

    def rows(self, name: str) -> Tensor:
        """What of the gallery a contender learns from."""
        return {RANDOM: self.others, WHOLE: torch.arange(len(self.gallery.pictures))}.get(name, self.picks)


def drawn(foundation: nn.Module, gallery: Gallery, effort: Effort, seed: int) -> Task:
    """The labels of a seed, the head that learns them, and the unlabelled pictures."""
    labelled = few_labels(effort, seed)
    features, labels = labelled_features(foundation, labelled)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(len(gallery.pictures), generator=generator)[: effort.retrieved]
    head = Head.fitted(features, labels, TaskOrientedTransfer().decay)
    return Task(labelled, head, gallery, retrieve(gallery.features, features, effort.retrieved), others)


def taught(name: str, task: Task, effort: Effort, rate: float, seed: int, seconds: float) -> tuple[nn.Module, int]:
    """One contender's student and its updates; labels alone train for `seconds`, or as many updates when that is 0."""
    method = TaskOrientedTransfer(effort.steps, effort.tuning_steps, BATCH, rate, rate / 3, seed=seed)
    model, picks = built(STUDENTS[STUDENT], seed), task.rows(name)
    pictures, features = task.gallery.pictures[picks], task.gallery.features[picks]
    if name in (OURS, RANDOM, WHOLE):
        method.learn_(model, pictures, task.head(features))
    elif name == PSEUDO:
        method.with_(temperature=1.0).learn_(model, pictures, certain(task.head(features)))
    elif name == AGNOSTIC:
        match_features_(model, pictures, features, method)
        method = method.with_(tuning_lr=rate)  # its head is new
    else:
        return model, alone_(model, task.labelled, method, seconds)
    method.tune_(model, task.labelled)
    return model.eval(), method.steps + method.tuning_steps


def certain(logits: Tensor) -> Tensor:
    """Logits of a distribution that is sure of the most probable class."""
    return 50.0 * F.one_hot(logits.argmax(-1), logits.shape[-1]).float()


def match_features_(model: nn.Module, pictures: Tensor, features: Tensor, method: TaskOrientedTransfer) -> None:
    """Train a student, under a linear map that is thrown away, to give standardized features; its head stays new."""
    head = model.head
    assert isinstance(head, nn.Linear)
    target = (features - features.mean(0)) / features.std(0).clamp_min(1e-3)
    model.head = built(partial(nn.Linear, head.in_features, target.shape[1]), method.seed)

    def loss(model: nn.Module, picks: Tensor) -> Tensor:
        return F.mse_loss(model(pictures[picks]), target[picks])

    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(method.seed))
    train(model, order.split(BATCH), loss, steps=method.steps, lr=method.lr, clip_norm=1.0, seed=method.seed)
    model.head = head


def alone_(model: nn.Module, labelled: Batch, method: TaskOrientedTransfer, seconds: float) -> int:
    """Train a student on the labels alone; its updates."""

    def loss(model: nn.Module, picks: Tensor) -> Tensor:
        return F.cross_entropy(model(labelled["input"][picks]), labelled["label"][picks])

    order = torch.randperm(len(labelled["label"]), generator=torch.Generator().manual_seed(method.seed))
    steps = None if seconds else method.steps + method.tuning_steps
    history = train(
        model, order.split(BATCH), loss, steps=steps, seconds=seconds or None, lr=method.lr, clip_norm=1.0,
        seed=method.seed,
    )  # fmt: skip
    model.eval()
    return history.steps


def tuned(foundation: nn.Module, gallery: Gallery, effort: Effort, seed: int) -> dict[str, float]:
    """The best learning rate of every contender on validation pictures, on a draw of labels of its own."""
    task, validation = drawn(foundation, gallery, effort, seed), held_out("validation", effort.test_pictures // 4)

    def score(name: str, rate: float) -> float:
        return float(right(taught(name, task, effort, rate, seed, 0.0)[0], validation).mean())

    return {name: best_rate(RATES, partial(score, name)) for name in CONTENDERS}
