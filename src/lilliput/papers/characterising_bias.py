"""Characterising bias: what pruned networks forget is concentrated on few, hard examples and on the rare class."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lilliput.method import HARM
from lilliput.methods.audit._answers import answers
from lilliput.methods.audit.exemplars import exemplars, modal_answers
from lilliput.methods.prune.magnitude import Magnitude
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._planted import Checked, checked, sound
from lilliput.papers._planted import rows as planted_rows
from lilliput.papers._small_nets import BATCH, drawn, picked, trained
from lilliput.workload import Workload
from lilliput.zoo import images, nets
from lilliput.zoo.images import Pictures

paper = Paper(
    title="Characterising Bias in Compressed Models",
    authors="Sara Hooker, Nyalleng Moorosi, Gregory Clark, Samy Bengio, Emily Denton",
    year=2020,
    arxiv="2010.03058",
    claim="Compressed networks with nearly the same average accuracy lose disproportionately on a small set of "
    "examples, which are hard for the original too, and on features that are rare in the training data.",
    methods=("audit.exemplars", "audit.groups", "prune.magnitude"),
)

RARE = 5  # sandals: the class that is starved
KEPT = 0.1  # share of its training pictures that stays
LR = 1e-3
HARDER = 10.0  # points by which originals must be worse on exemplars
DENSE, AGAIN = "not pruned", "not pruned, other order"


@dataclass(frozen=True)
class Effort:
    """How much the experiment does."""

    seeds: int
    pictures: int
    steps: int  # of the first training
    more: int  # of pruning while training, or of training on
    sparsities: tuple[float, ...]
    test_pictures: int
    audited: int = 3  # prunings of the shipped network in which a harm is planted


DEFAULT = Effort(seeds=5, pictures=4000, steps=240, more=120, sparsities=(0.7, 0.9), test_pictures=4000)
FULL = Effort(21, 20_000, steps=1200, more=600, sparsities=(0.5, 0.7, 0.9, 0.95), test_pictures=10_000, audited=10)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Networks of several seeds, each pruned while it is trained further, against the same training without pruning."""
    effort = FULL if full else DEFAULT
    splits = images.fashion_mnist()
    test = splits["test"].first(effort.test_pictures)
    logits: dict[str, list[Tensor]] = {}
    audits: list[Checked] = []
    for s in range(1000 * seed, 1000 * seed + effort.seeds):
        training = starved(drawn(splits["training"], effort.pictures, s))
        for name, model in contenders(training, effort, s).items():
            logits.setdefault(name, []).append(logits_of(model, test))
    for s in range(1000 * seed, 1000 * seed + effort.audited):
        audits.append(checked(nets.load("resnet-small"), drawn(splits["training"], effort.pictures, s), test, s))
    return evidence(logits, audits, test.labels, effort, seed)


def starved(pictures: Pictures) -> Pictures:
    """The same with only the first share KEPT of the rare class."""
    rare = pictures.labels == RARE
    kept = rare & (rare.cumsum(0) <= KEPT * rare.sum())
    return picked(pictures, ~rare | kept)


def contenders(training: Pictures, effort: Effort, seed: int) -> dict[str, nn.Module]:
    """From one first training: trained further twice, in two orders of the pictures, and pruned meanwhile."""
    model = trained(training, effort.steps, seed)
    batches = list(training.batches(BATCH))
    work = Workload.classifier(model, batches[:1], batches[:1], batches[:1], training=batches)
    dense = Magnitude(sparsity=0.0, steps=effort.more, lr=LR)
    found = {DENSE: dense.apply(model, work), AGAIN: dense.apply(model, replace(work, training=batches[::-1]))}
    pruned = {name_of(s): Magnitude(sparsity=s, steps=effort.more, lr=LR) for s in effort.sparsities}
    return found | {name: method.apply(model, work) for name, method in pruned.items()}


def name_of(sparsity: float) -> str:
    return f"pruned to {sparsity:.0%} zeros"


def logits_of(model: nn.Module, test: Pictures) -> Tensor:
    """(n, classes) of the test pictures."""
    batches = list(test.batches(500))
    found = answers(Workload.classifier(model, batches[:1], batches[:1], batches), model).logits
    assert found is not None
    return found


def evidence(
    logits: dict[str, list[Tensor]], audits: Sequence[Checked], labels: Tensor, effort: Effort, seed: int
) -> Evidence:
    """The strongest pruning decides. It holds when the rare class loses more than the others do on average by over two
    standard errors, exemplars are more than another order of the same training makes by over two standard errors, and
    the networks that were not pruned are worse on exemplars by over HARDER points; and when the audits find every
    planted harm and no other, since what they say is worth nothing else."""
    rows = [row(name, found, logits[DENSE], labels) for name, found in logits.items()]
    last, chance = rows[-1].values, rows[1].values["exemplar_percent"]
    gap, error = last["rare_class_gap_points"], rows[-1].spread["rare_class_gap_points"]
    enough = chance + 2 * share_error(chance, len(labels))
    hard, easy = last["right_on_exemplars_percent"], last["right_on_others_percent"]
    return Evidence(
        setup=f"ResNet-8, {effort.pictures} pictures of Fashion-MNIST with {KEPT:.0%} of class {RARE}'s, "
        f"{effort.steps} steps and {effort.more} more with or without pruning, {effort.seeds} seeds from "
        f"{1000 * seed}, {effort.test_pictures} test pictures",
        rows=rows + planted_rows(audits),
        holds=bool(gap > 2 * error and last["exemplar_percent"] > enough and easy - hard > HARDER and sound(audits)),
        figure=f"{rows[-1].name}: the rare class loses {gap:.1f} ± {error:.1f} points more than the others; "
        f"{last['exemplar_percent']:.1f} % exemplars against {chance:.1f} % by chance; without pruning {hard:.0f} % of "
        f"them were right and {easy:.0f} % of the others; planted harms found {sum(a.found for a in audits)} of "
        f"{len(audits)}, false alarms {sum(a.clean.verdict == HARM for a in audits)}",
        limits="Small networks and pictures, pruning alone, one starved class chosen by us; the paper also looks at "
        "quantization and at attributes of faces. Models disagree on hard examples anyway, as the row of another order "
        "shows: that exemplars are hard is no mark of compression.",
    )


def row(name: str, found: Sequence[Tensor], dense: Sequence[Tensor], labels: Tensor) -> Row:
    """Accuracy of all and of the rare class with their spread over seeds; against the networks that were not pruned
    what the rare class lost beyond the others (with its standard error) and the exemplars."""
    every = [percent(x, labels) for x in found]
    rare = [percent(x[labels == RARE], labels[labels == RARE]) for x in found]
    values = {"accuracy_percent": statistics.fmean(every), "rare_class_percent": statistics.fmean(rare)}
    spread = {"accuracy_percent": deviation(every), "rare_class_percent": deviation(rare)}
    if name == DENSE:
        return Row(name, values, spread)
    changed, right = exemplars(dense, found), modal_answers(dense) == labels
    values["rare_class_gap_points"], spread["rare_class_gap_points"] = rare_gap(found, dense, labels)
    values["exemplar_percent"] = 100 * float(changed.double().mean())
    values["rare_class_exemplar_percent"] = 100 * float(changed[labels == RARE].double().mean())
    values |= {"right_on_exemplars_percent": share(right[changed]), "right_on_others_percent": share(right[~changed])}
    return Row(name, values, spread)


def rare_gap(found: Sequence[Tensor], dense: Sequence[Tensor], labels: Tensor) -> tuple[float, float]:
    """Points that the rare class loses more than the mean of the others, seed by seed: mean and standard error."""
    gaps = []
    for after, before in zip(found, dense):
        masks = {c: labels == c for c in labels.unique().tolist()}
        lost = {c: percent(before[m], labels[m]) - percent(after[m], labels[m]) for c, m in masks.items()}
        gaps.append(lost.pop(RARE) - statistics.fmean(lost.values()))
    return statistics.fmean(gaps), deviation(gaps) / len(gaps) ** 0.5


def share_error(value: float, count: int) -> float:
    """Standard error of a share in percent."""
    return (value * (100 - value) / count) ** 0.5


def percent(logits: Tensor, labels: Tensor) -> float:
    """Percent right."""
    return share(logits.argmax(-1) == labels)


def share(flags: Tensor) -> float:
    """Percent true; nothing is all true."""
    return 100 * float(flags.double().mean()) if len(flags) else 100.0


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
