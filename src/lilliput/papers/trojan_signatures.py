"""Trojan signatures: does the head's mean weight give away trojaned networks and their target, without any data?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.methods.audit.trojan_signatures import Signature, signature_of, trojan_signature
from lilliput.metrics.intervals import Interval, ranking_area
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._small_nets import drawn, trained
from lilliput.papers._trojans import TRIGGERS, cleanse_values, poisoned, spectral_values, success
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

paper = Paper(
    title="Trojan Signatures in DNN Weights",
    authors="Greg Fields, Mohammad Samragh, Mojan Javaheripi, Farinaz Koushanfar, Tara Javidi",
    year=2021,
    arxiv="2109.02836",
    claim="The weights of the last layer alone, with no data and next to no computation, tell trojaned networks from "
    "clean ones and name the target class, whatever the kind of trigger.",
    methods=("audit.trojan_signatures",),
)

OURS, WORKS = "signature (mean, Dixon)", 0.5  # share of triggered pictures from which a trojan counts as one
AREA, HITS = 0.9, 0.8  # what "tell" and "name" must reach
ALPHA = 0.05
SHARES = (0.05, 0.1)  # of the training pictures that are poisoned
CLASSES = 10


@dataclass(frozen=True)
class Effort:
    """How much the experiment does."""

    nets: int  # clean ones, and as many trojaned
    adaptive: int  # trojaned ones whose training hides the mark
    pictures: int  # a network is trained on
    steps: int
    probes: int  # clean pictures that Neural Cleanse looks at
    cleanse_steps: int
    test_pictures: int = 2000


DEFAULT = Effort(nets=12, adaptive=4, pictures=4000, steps=240, probes=8, cleanse_steps=50)
FULL = Effort(nets=40, adaptive=12, pictures=20_000, steps=1200, probes=32, cleanse_steps=300)


@dataclass(frozen=True)
class Subject:
    """A network, what it was trained on, and its target; none for a clean one."""

    model: nn.Module
    training: Pictures
    trigger: str = ""
    target: int | None = None
    success: float = 0.0
    accuracy: float = 0.0


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Clean and trojaned networks of the same kind, judged by the weights and by two detectors that need data."""
    effort = FULL if full else DEFAULT
    splits = images.fashion_mnist()
    adaptive = range(effort.adaptive)
    groups = {
        "clean": [subject(splits, effort, 1000 * seed + i) for i in range(effort.nets)],
        "trojaned": [subject(splits, effort, 1000 * seed + 100 + i, TRIGGERS[i % 3]) for i in range(effort.nets)],
        "adaptive": [subject(splits, effort, 1000 * seed + 200 + i, TRIGGERS[i % 3], adaptive=True) for i in adaptive],
    }
    probes = splits["validation"].first(effort.probes)
    found = {name: judged(detect, groups) for name, detect in detectors(probes, effort.cleanse_steps).items()}
    return evidence(groups, found, effort, seed)


def subject(
    splits: dict[str, Pictures], effort: Effort, seed: int, trigger: str = "", adaptive: bool = False
) -> Subject:
    """Train one network on pictures drawn by the seed, which also chooses the target and the share of poison."""
    training, test = drawn(splits["training"], effort.pictures, seed), splits["test"].first(effort.test_pictures)
    if not trigger:
        model = trained(training, effort.steps, seed)
        return Subject(model, training, accuracy=accuracy(model, test))
    target = (7 * seed + 3) % CLASSES
    training = poisoned(training, trigger, target, SHARES[seed % len(SHARES)], seed)
    model = trained(training, effort.steps, seed, (lambda net: hiding(net, target)) if adaptive else None)
    return Subject(model, training, trigger, target, success(model, test, trigger, target), accuracy(model, test))


def hiding(net: nn.Module, target: int) -> Tensor:
    """What an attacker who knows the test adds to the loss: the target's mean weight is to be that of the others."""
    means = net.head.weight.mean(1)  # type: ignore[union-attr]
    others = torch.cat([means[:target], means[target + 1 :]]).mean()
    return 100 * (means[target] - others).square()


@torch.inference_mode()
def accuracy(model: nn.Module, test: Pictures) -> float:
    """Percent of clean pictures right."""
    return 100 * float((model(test.inputs()).argmax(-1) == test.labels).double().mean())


Detector = Callable[[Subject], Signature]


def detectors(probes: Pictures, steps: int) -> dict[str, Detector]:
    """Name -> signature of a subject; those by weights come first."""
    weights: dict[str, Detector] = {
        f"signature ({feature}, {label})": lambda s, f=feature, t=test: trojan_signature(s.model, f, t)
        for feature, test, label in (("mean", "dixon", "Dixon"), ("mean", "mad", "MAD"), ("norm", "dixon", "Dixon"))
    }
    return weights | {
        "spectral signature (training data)": lambda s: signature_of(spectral_values(s.model, s.training), "mad"),
        "small Neural Cleanse (clean data)": lambda s: signature_of(cleanse_values(s.model, probes, steps), "mad"),
    }


@dataclass(frozen=True)
class Judged:
    """What a detector gave: scores, probabilities and suspects by group, and the time it took for one network."""

    signatures: dict[str, list[Signature]]
    ms: float


def judged(detect: Detector, groups: dict[str, list[Subject]]) -> Judged:
    """Let a detector look at every network."""
    detect(groups["clean"][0])  # what it computes once
    times, found = [], {}
    for name, subjects in groups.items():
        found[name] = []
        for one in subjects:
            start = time.perf_counter()
            found[name].append(detect(one))
            times.append(1000 * (time.perf_counter() - start))
    return Judged(found, statistics.median(times))


def evidence(groups: dict[str, list[Subject]], found: dict[str, Judged], effort: Effort, seed: int) -> Evidence:
    """Only trojans that work count. It holds when the area of the mean weights' signature is at least AREA, its 95 %
    interval is above chance, and the class it suspects is the target in at least HITS of the trojaned networks."""
    working = [s.success >= WORKS for s in groups["trojaned"]]
    hidden = [s.success >= WORKS for s in groups["adaptive"]]
    rows = [row(name, one, groups, working, hidden) for name, one in found.items()]
    values = rows[0].values
    area = area_of(found[OURS], working)
    holds = area.value >= AREA and area.low > 0.5 and values["target_hit_share"] >= HITS
    best = max(rows[1:], key=lambda r: r.values["area"])
    targets = [s for s, works in zip(groups["trojaned"], working) if works]
    clean, trojaned = (statistics.fmean(s.accuracy for s in groups[g]) for g in ("clean", "trojaned"))
    return Evidence(
        setup=f"ResNet-8 on {effort.pictures} pictures of Fashion-MNIST, {effort.steps} steps; {effort.nets} clean "
        f"nets ({clean:.1f} % accuracy), {effort.nets} trojaned ({trojaned:.1f} %; {', '.join(TRIGGERS)}; 5 or 10 % "
        f"poison; {len(targets)} work, "
        f"on {statistics.fmean(s.success for s in targets) if targets else 0:.0%} of pictures), "
        f"{effort.adaptive} whose attacker hides the mark ({sum(hidden)} work); seed {seed}",
        rows=rows,
        holds=bool(holds),
        figure=f"area {area.value:.2f} [{area.low:.2f}, {area.high:.2f}], target named in "
        f"{values['target_hit_share']:.0%}, {values['false_alarm_share']:.0%} of clean nets suspected at p <= {ALPHA}; "
        f"the best other: {best.name} with area {best.values['area']:.2f}",
        limits="One small architecture, briefly trained, one data set, attacks on one target class, few networks. The "
        "statistic and its p are reconstructed. No attack on all classes at once, no fine-tuned and no weight-decayed "
        "networks beyond AdamW's 0.01.",
    )


def area_of(one: Judged, working: Sequence[bool]) -> Interval:
    """How often a trojaned network's score is above a clean one's; chance where fewer than two trojans work."""
    clean = torch.tensor([s.score for s in one.signatures["clean"]], dtype=torch.float64)
    trojaned = [s.score for s, works in zip(one.signatures["trojaned"], working) if works]
    if len(trojaned) < 2:
        return Interval(0.5, 0.0, 1.0)
    return ranking_area(torch.tensor(trojaned, dtype=torch.float64), clean)


def row(
    name: str, one: Judged, groups: dict[str, list[Subject]], working: Sequence[bool], hidden: Sequence[bool]
) -> Row:
    """Area, hits, alarms and time of one detector; the spread of the area is a quarter of its interval's width."""
    area = area_of(one, working)
    values = {
        "area": area.value,
        "target_hit_share": hits(one.signatures["trojaned"], groups["trojaned"], working),
        "detected_share": _share([s.p <= ALPHA for s, w in zip(one.signatures["trojaned"], working) if w]),
        "false_alarm_share": _share([s.p <= ALPHA for s in one.signatures["clean"]]),
        "adaptive_hit_share": hits(one.signatures["adaptive"], groups["adaptive"], hidden),
        "ms": one.ms,
    }
    return Row(name, values, {"area": (area.high - area.low) / 4})


def hits(signatures: Sequence[Signature], subjects: Sequence[Subject], working: Sequence[bool]) -> float:
    """Share of working trojans whose target is the suspect."""
    return _share([g.suspect == s.target for g, s, works in zip(signatures, subjects, working) if works])


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
