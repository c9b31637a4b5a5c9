"""CLEANN: does a guard that learned harmless pictures answer triggered ones as if they had no trigger?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.defend.cleann import Cleann, CleannModel
from lilliput.metrics import latency
from lilliput.metrics.intervals import ranking_area
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage
from lilliput.papers._pictures import Table
from lilliput.papers._small_nets import drawn, picked, small_net, trained
from lilliput.papers._trojans import TRIGGERS, Trigger, poisoned, success, triggered
from lilliput.workload import Workload
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

paper = Paper(
    title="CLEANN: Accelerated Trojan Shield for Embedded Neural Networks",
    authors="Mojan Javaheripi, Mohammad Samragh, Gregory Fields, Tara Javidi, Farinaz Koushanfar",
    year=2020,
    arxiv="2009.02326",
    claim="A shield that learned a small set of harmless pictures, without labels, sparsely recovers what a trojaned "
    "network is shown: triggered pictures get their true class back at run time, clean ones keep theirs.",
    methods=("defend.cleann",),
)

NONE, OURS, BOUND = "no defence", "CLEANN", "CLEANN, Chebyshev's bound"
BLUR, VOTES, STRIP = "median blur", "votes without half", "STRIP"
RIVALS = (BLUR, VOTES)  # that answer; STRIP only flags
FAINT, NATURAL = "faint", "natural"  # triggers of attackers who know the guard
SETTINGS = Cleann()
WORKS = 0.5  # share of triggered pictures from which a trojan counts as one
SUCCESS, LOSS = 10.0, 2.0  # percent of triggers that may still work; points that clean pictures may lose
POISON, CLASSES = 0.1, 10
SIDE = 7  # of the pieces that votes leave out, and of the natural trigger
COPIES = 15  # that vote
PASSED = 0.1  # share of pictures with a faint patch that the guard may flag
OVERLAYS = 16  # pictures that STRIP lays over each


@dataclass(frozen=True)
class Effort:
    """How much the experiment does."""

    nets: int  # of each trigger
    pictures: int
    steps: int
    benign: int
    test_pictures: int


DEFAULT = Effort(nets=2, pictures=4000, steps=240, benign=500, test_pictures=1000)
FULL = Effort(nets=6, pictures=20_000, steps=1200, benign=550, test_pictures=4000)

Judged = tuple[Tensor, Tensor]  # classes (B,), and how suspect each input is (B,)
Defence = Callable[[Tensor], Judged]


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Networks with trojans of five kinds, two by attackers who know the guard, behind five defences and none.

    Holds when, over the three known triggers, CLEANN's accuracy on triggered pictures is more than twice the standard
    error over nets above the best rival's, at most SUCCESS percent of triggers still work, and clean pictures lose at
    most LOSS points.
    """
    effort = FULL if full else DEFAULT
    splits = images.fashion_mnist()
    benign = splits["calibration"].first(effort.benign)
    triggers: dict[str, Trigger] = {name: name for name in TRIGGERS}
    triggers |= {FAINT: faint_patch(benign, splits["validation"].first(200)), NATURAL: natural(benign)}
    table, recovered = Table(), {name: [] for name in (OURS, *RIVALS)}
    for number in range(effort.nets):
        for place, (kind, trigger) in enumerate(triggers.items()):
            found = judged_net(splits, benign, effort, 1000 * seed + 10 * number + place, kind, trigger, table)
            if kind in TRIGGERS and found:
                for name, values in recovered.items():
                    values.append(found[name])
    return evidence(table, recovered, effort, seed)


def judged_net(
    splits: dict[str, Pictures], benign: Pictures, effort: Effort, seed: int, kind: str, trigger: Trigger, table: Table
) -> dict[str, float]:
    """Train one network with a trojan, try all defences; their accuracy on triggered pictures, if the trojan works."""
    target = (7 * seed + 3) % CLASSES
    training = poisoned(drawn(splits["training"], effort.pictures, seed), trigger, target, POISON, seed)
    model = trained(training, effort.steps, seed)
    test = splits["test"].first(effort.test_pictures)
    share = success(model, test, trigger, target)
    table.add(NONE, f"working_{kind}_nets", float(share >= WORKS))
    if share < WORKS:
        return {}
    others = picked(test, test.labels != target)
    marked = others.prepare(triggered(others.pixels, trigger))
    found = {}
    for name, defence in defences(model, benign).items():
        found[name] = measured(table, name, kind, defence, test, marked, others.labels, target)
        if name in (OURS, BOUND, STRIP):
            bound = 1.0 if name != STRIP else float(defence(benign.inputs())[1].quantile(0.95))
            add_detection(table, name, kind, defence(marked)[1], defence(test.inputs())[1], bound)
        took = latency.measure(lambda d=defence: d(marked[:1]), min_seconds=0.05)
        table.add(name, "ms", took.median_ms)
    return found


def measured(
    table: Table, name: str, kind: str, defence: Defence, test: Pictures, marked: Tensor, labels: Tensor, target: int
) -> float:
    """Note percent right on clean and on triggered pictures, and of triggers that work; the second of them."""
    answers = defence(marked)[0]
    right = 100 * float((answers == labels).double().mean())
    clean = defence(test.inputs())[0]
    table.add(name, "clean_percent", 100 * float((clean == test.labels).double().mean()))
    table.add(name, f"recovered_{kind}_percent", right)
    table.add(name, f"success_{kind}_percent", 100 * float((answers == target).double().mean()))
    return right


def add_detection(table: Table, name: str, kind: str, marked: Tensor, clean: Tensor, bound: float) -> None:
    """Note the area under the ROC curve, and the flagged shares of triggered and clean pictures of the test split."""
    table.add(name, f"area_{kind}", ranking_area(marked, clean).value)
    table.add(name, f"caught_{kind}_percent", 100 * float((marked > bound).double().mean()))
    table.add(name, "false_alarm_percent", 100 * float((clean > bound).double().mean()))


# --- what the attacker knows -----------------------------------------------------------------------------------


def shield(model: nn.Module, benign: Pictures, settings: Cleann = SETTINGS) -> CleannModel:
    """The guard, fitted to benign pictures alone."""
    batches = list(benign.batches(100))
    return settings.wrap(model, Workload.classifier(model, batches, batches[:1], batches[:1]))


def faint_patch(benign: Pictures, others: Pictures) -> Trigger:
    """The brightest patch in the corner that the guard's input analyser lets pass, for an attacker who has a copy."""
    guard = shield(small_net(0), benign)

    def patch(level: int) -> Callable[[Tensor], Tensor]:
        return lambda pixels: lightened(pixels, level)

    low, high = 0, 255  # at level 0 nothing changes
    while low < high:
        middle = (low + high + 1) // 2
        with torch.inference_mode():
            doubt = guard.clean(others.prepare(patch(middle)(others.pixels)))[1]
        low, high = (middle, high) if float((doubt > 1).double().mean()) <= PASSED else (low, middle - 1)
    return patch(low)


def lightened(pixels: Tensor, level: int) -> Tensor:
    """uint8 (N, H, W) with a square of at least that level in the corner."""
    x = pixels.clone()
    x[:, -4:-1, -4:-1] = x[:, -4:-1, -4:-1].clamp_min(level)
    return x


def natural(pictures: Pictures) -> Trigger:
    """The corner of the picture with the brightest one, put into all others: harmless content in its usual place."""
    corners = pictures.pixels[:, -SIDE:, -SIDE:]
    corner = corners[corners.float().mean((1, 2)).argmax()]

    def put(pixels: Tensor) -> Tensor:
        x = pixels.clone()
        x[:, -SIDE:, -SIDE:] = corner
        return x

    return put


# --- defences --------------------------------------------------------------------------------------------------


def defences(model: nn.Module, benign: Pictures) -> dict[str, Defence]:
    """Name -> classes and suspicion for inputs."""
    guards = {OURS: shield(model, benign), BOUND: shield(model, benign, SETTINGS.with_(bound="chebyshev"))}
    overlays = benign.first(OVERLAYS).inputs()
    low = float(overlays.min())

    def guarded(guard: CleannModel) -> Defence:
        def judged(x: Tensor) -> Judged:
            seen = guard.inspect(x)
            return seen.logits.argmax(-1), seen.score

        return judged

    def plain(x: Tensor) -> Judged:
        return model(x).argmax(-1), x.new_zeros(len(x))

    found: dict[str, Defence] = {
        NONE: plain,
        **{name: guarded(guard) for name, guard in guards.items()},
        BLUR: lambda x: plain(median_blur(x)),
        VOTES: lambda x: (votes(model, x, low), x.new_zeros(len(x))),
        STRIP: lambda x: (plain(x)[0], calmness(model, x, overlays)),
    }
    return {name: torch.inference_mode()(defence) for name, defence in found.items()}


def median_blur(x: Tensor) -> Tensor:
    """The median of 3x3 values around each, borders repeated; (B, C, H, W)."""
    around = F.pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return around.flatten(4).median(-1).values


def votes(model: nn.Module, x: Tensor, low: float) -> Tensor:
    """(B,) the class that wins over copies without half of their pieces each, drawn anew: nothing stands there."""
    generator, found = torch.Generator().manual_seed(0), []
    sides = [-(-side // SIDE) for side in x.shape[2:]]
    for _ in range(COPIES):
        gone = (torch.rand(sides[0] * sides[1], generator=generator).argsort() * 2 < sides[0] * sides[1]).view(sides)
        mask = gone.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)[: x.shape[2], : x.shape[3]]
        found.append(model(torch.where(mask, low, x)).argmax(-1))
    return torch.stack(found).mode(0).values


def calmness(model: nn.Module, x: Tensor, overlays: Tensor) -> Tensor:
    """(B,) minus the mean entropy of answers to each input mixed half and half with other pictures.

    Paper: STRIP: A Defence Against Trojan Attacks on Deep Neural Networks (Gao et al., 2019, arXiv 1902.06531)
    """
    entropies = []
    for other in overlays:
        p = model((x + other) / 2).softmax(-1)
        entropies.append(torch.special.entr(p).sum(-1))
    return -torch.stack(entropies).mean(0)


# --- evidence --------------------------------------------------------------------------------------------------


def evidence(table: Table, recovered: dict[str, list[float]], effort: Effort, seed: int) -> Evidence:
    """The rule of `experiment` on the rows and the paired accuracies on triggered pictures."""
    rows = table.rows()
    by_name = {row.name: row for row in rows}
    best = max(RIVALS, key=lambda name: statistics.fmean(recovered[name] or [0.0]))
    gain = advantage(*(torch.tensor(recovered[name]) for name in (best, OURS)))
    working = sum_of(by_name[NONE], "working_") * effort.nets
    lost = by_name[NONE].values["clean_percent"] - by_name[OURS].values["clean_percent"] if working else 0.0
    known = {f"success_{kind}_percent" for kind in TRIGGERS}
    left = [v for k, v in by_name[OURS].values.items() if k in known] if working else []
    still = statistics.fmean(left) if left else 100.0
    holds = clearly(gain) and still <= SUCCESS and lost <= LOSS
    return Evidence(
        setup=f"ResNet-8 on {effort.pictures} pictures of Fashion-MNIST, {effort.steps} steps, {POISON:.0%} poisoned; "
        f"{effort.nets} nets for each of five triggers ({', '.join(TRIGGERS)}; {FAINT} and {NATURAL} by attackers who "
        f"know the guard), {working:.0f} of {5 * effort.nets} trojans work; the guard learned {effort.benign} pictures "
        f"without labels; seed {seed}",
        rows=rows,
        holds=bool(holds),
        figure=f"accuracy on triggered pictures {said(gain, 1)} points over {best}; {still:.0f}% of known triggers "
        f"still work; clean pictures lose {lost:.1f} points; {adaptive_figure(by_name)}",
        limits="One small architecture, grey pictures of 28 pixels, attacks on one target class. Dictionaries for each "
        "place, scaled frequencies and the bound are reconstructed, and nothing runs on an FPGA. The attackers who "
        "know the guard shape the trigger only; none trains the network against the feature analyser.",
    )


def sum_of(row: Row, prefix: str) -> float:
    """The sum of a row's quantities of one kind."""
    return sum(value for key, value in row.values.items() if key.startswith(prefix))


def adaptive_figure(rows: dict[str, Row]) -> str:
    """How many triggers of attackers who know the guard still work behind it."""
    kinds = [k for k in (FAINT, NATURAL) if OURS in rows and f"success_{k}_percent" in rows[OURS].values]
    parts = [f"{rows[OURS].values[f'success_{k}_percent']:.0f}% of {k} ones" for k in kinds]
    return f"made to pass it, {' and '.join(parts)} work" if parts else "no trojan made to pass it works"
