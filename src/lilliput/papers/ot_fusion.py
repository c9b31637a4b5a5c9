"""Model fusion: are two nets, aligned neuron by neuron and averaged, better than averaged as they are?"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.initialize.ot_fusion import OtFusion
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage_by_seed
from lilliput.papers._pictures import Table
from lilliput.training import train
from lilliput.workload import Classifier, Workload
from lilliput.zoo import images

paper = Paper(
    title="Model Fusion via Optimal Transport",
    authors="Sidak Pal Singh, Martin Jaggi",
    year=2020,
    arxiv="1910.05653",
    claim="Two trained nets whose neurons are aligned layer by layer by optimal transport average to a net that is far "
    "better than their plain average, and that, tuned shortly, is better than either of them and stands for their "
    "ensemble; it works for other widths too.",
    methods=("initialize.ot_fusion",),
)

FIRST, SECOND, ENSEMBLE = "first net", "second net", "ensemble of both (twice the cost)"
VANILLA, OURS, ANSWERS = "plain average", "fused by weights", "fused by activations"
TUNED = ", tuned"
NARROWED = "fused with a net twice as wide"
RATE, TUNING_RATE = 2e-3, 1e-3  # of the parents; of tuning, for all alike
Gain = tuple[float, float]  # percentage points, standard error


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # of training a parent
    tuning: int  # steps
    seeds: int
    pictures: int = 55_000
    batch_size: int = 128


def mlp(factor: int = 1) -> nn.Module:
    """Three hidden layers."""
    widths = [784, 256 * factor, 128 * factor, 64 * factor]
    layers = (layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU()))
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def cnn(factor: int = 1) -> nn.Module:
    """Three convolutions and a hidden layer, without norms."""
    a, b, c = 16 * factor, 32 * factor, 64 * factor
    convolutions = nn.Conv2d(1, a, 3, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 2, 1)
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(16 * b, c), nn.ReLU(), nn.Linear(c, 10))


NETS = {"mlp": mlp, "cnn": cnn}


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Pairs of nets of other first weights and orders of the same pictures.

    Holds when, on both kinds of net, the fused one is more accurate than the plain average by more than two standard
    errors over seeds as it is, and after equally many steps of tuning more accurate than the better of the two nets
    tuned as long. `full` trains longer, on five seeds.
    """
    effort = Effort(steps=2500, tuning=500, seeds=5) if full else Effort(steps=500, tuning=150, seeds=3)
    table, found = Table(), dict[str, dict[str, list[float]]]()
    for s in range(seed, seed + effort.seeds):
        for kind in NETS:
            note(table, found, kind, compare(kind, effort, s))
    at_once = {kind: advantage_by_seed(found[kind][OURS], found[kind][VANILLA]) for kind in NETS}
    tuned = {kind: advantage_by_seed(found[kind][OURS + TUNED], better(found[kind], TUNED)) for kind in NETS}
    behind = {kind: advantage_by_seed(found[kind][OURS + TUNED], found[kind][ENSEMBLE]) for kind in NETS}
    return Evidence(
        setup=f"MLPs of three hidden layers and nets of three convolutions, Fashion-MNIST, {effort.steps} steps of "
        f"{effort.batch_size} pictures, {effort.tuning} steps of tuning, {effort.seeds} pairs from seed {seed}, 10,000 "
        f"test pictures; exact assignments; {torch.get_num_threads()} threads, CPU",
        rows=table.rows(),
        holds=judge(at_once, tuned),
        figure="; ".join(
            f"{kind}: {said(at_once[kind])} points over the plain average, tuned {said(tuned[kind])} over the better "
            f"net tuned as long, {said(behind[kind])} over the ensemble"
            for kind in NETS
        ),
        limits="Small nets trained for a few epochs at most on the same pictures; not the paper's split of the data, "
        "and no residual nets. Tuning uses the training pictures again; both nets are wanted for other reasons, so "
        "training the second is not counted against fusion.",
    )


def judge(at_once: Mapping[str, Gain], tuned: Mapping[str, Gain]) -> bool:
    """The rule of `experiment`; gains are (points, standard error)."""
    return all(map(clearly, at_once.values())) and all(map(clearly, tuned.values()))


def better(found: Mapping[str, Sequence[float]], suffix: str = "") -> list[float]:
    """Accuracy of the better of the two nets for each seed."""
    return [max(pair) for pair in zip(found[FIRST + suffix], found[SECOND + suffix])]


def note(table: Table, found: dict[str, dict[str, list[float]]], kind: str, scores: Mapping[str, float]) -> None:
    """Add the accuracies of one seed."""
    for name, value in scores.items():
        table.add(f"{kind}: {name}", "accuracy_percent", value)
        found.setdefault(kind, {}).setdefault(name, []).append(value)


def compare(kind: str, effort: Effort, seed: int) -> dict[str, float]:
    """Accuracy of every contender on one pair of nets, percent of the test pictures."""
    first, second = (trained(kind, 1, effort, 2 * seed + i) for i in (0, 1))
    work = pictures_work(first, effort)
    averaged = copy.deepcopy(first)
    theirs = second.state_dict()
    averaged.load_state_dict({name: (tensor + theirs[name]) / 2 for name, tensor in first.state_dict().items()})
    fused = {OURS: OtFusion(), ANSWERS: OtFusion(ground="activations")}
    models = {FIRST: first, SECOND: second, VANILLA: averaged}
    models |= {name: settings.fuse(first, second, work) for name, settings in fused.items()}
    wide = trained(kind, 2, effort, 1000 + seed)
    models[NARROWED] = OtFusion().fuse(first, wide, work)
    scores = {ENSEMBLE: ensemble_accuracy((first, second), work)}
    for name, model in models.items():
        scores[name] = work.score(model, "test").value
        scores[name + TUNED] = work.score(tuned(model, work, effort, seed), "test").value
    return scores


def pictures_work(model: nn.Module, effort: Effort) -> Classifier:
    """Fashion-MNIST around a net; what neurons answer is seen on the calibration pictures."""
    splits = images.fashion_mnist()
    held = [list(splits[split].first(count).batches(250)) for split, count in
            (("calibration", 500), ("validation", 250), ("test", 10_000))]  # fmt: skip
    training = list(splits["training"].first(effort.pictures).batches(effort.batch_size))
    return Workload.classifier(model, *held, training=training)


def trained(kind: str, factor: int, effort: Effort, seed: int) -> nn.Module:
    """A net of its own first weights and order of the pictures."""
    torch.manual_seed(seed)
    model = NETS[kind](factor)
    batches = images.fashion_mnist()["training"].first(effort.pictures).batches(effort.batch_size)
    train(model, batches, loss, steps=effort.steps, lr=RATE, clip_norm=1.0, seed=seed)
    return model.eval()


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input"]), batch["label"])


def tuned(model: nn.Module, work: Workload, effort: Effort, seed: int) -> nn.Module:
    """A copy after the steps of tuning that all get."""
    model = copy.deepcopy(model)
    train(model, list(work.training or ()), loss, steps=effort.tuning, lr=TUNING_RATE, clip_norm=1.0, seed=seed + 77)
    return model.eval()


@torch.inference_mode()
def ensemble_accuracy(models: Sequence[nn.Module], work: Workload) -> float:
    """Percent right of the mean of the nets' probabilities."""
    right = [
        (torch.stack([work.forward(m, b).softmax(-1) for m in models]).mean(0).argmax(-1) == b["label"]).float()
        for b in work.test
    ]
    return 100 * float(torch.cat(right).mean())
