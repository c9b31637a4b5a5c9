"""DeepFense: do modules that learned harmless pictures beside a model notice attacks better than the model itself?"""

from __future__ import annotations

import statistics

import torch

from lilliput.methods.defend.deepfense import DeepFense
from lilliput.metrics import latency
from lilliput.paper import Evidence, Paper
from lilliput.papers._adversaries import (
    ACCEPTED,
    Attacked,
    Effort,
    Suspicion,
    attacked,
    bound_of,
    evading,
    judge,
    max_softmax,
    squeezing,
    victim,
)
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage
from lilliput.papers._pictures import Table
from lilliput.workload import Classifier
from lilliput.zoo import images

paper = Paper(
    title="DeepFense: Online Accelerated Defense Against Adversarial Deep Learning",
    authors="Bita Darvish Rouhani, Mohammad Samragh, Mojan Javaheripi, Tara Javidi, Farinaz Koushanfar",
    year=2018,
    arxiv="1709.02538",
    claim="Redundant modules beside a model, trained on harmless data alone, detect adversarial inputs of several "
    "attacks at an accepted share of false alarms, and as many of them run as time allows.",
    methods=("defend.deepfense",),
)

OURS, FEWER, UNTRAINED = "DeepFense", "DeepFense, one module", "Mahalanobis (no training)"
SOFTMAX, SQUEEZING = "largest probability", "feature squeezing"
RIVALS = (UNTRAINED, SOFTMAX, SQUEEZING)
AREA = 0.9  # mean area under the ROC curve that "detect" asks for
ALARMS = 2.0  # times the accepted share of false alarms that test pictures may raise

DEFAULT = Effort(victims=3, pictures=4000, steps=240, calibration=800, attacked=250, eps=0.05, attack_steps=10,
                 adaptive_steps=40, module_steps=80)  # fmt: skip
FULL = Effort(victims=6, pictures=20_000, steps=1200, calibration=1000, attacked=1000, eps=0.05, attack_steps=40,
              adaptive_steps=200, module_steps=600)  # fmt: skip


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Detectors of four attacks on several victims, and of an attacker who knows each detector.

    Holds when DeepFense's area under the ROC curve, the mean of the attacks, is at least AREA and more than twice the
    standard error over victims above the best rival's, and false alarms stay below ALARMS times what is accepted.
    """
    effort = FULL if full else DEFAULT
    splits, table = images.fashion_mnist(), Table()
    areas: dict[str, list[float]] = {}
    for number in range(effort.victims):
        work = victim(splits, effort, 1000 * seed + number)
        found = attacked(work, effort)
        table.add(OURS, "fooled_percent", fooled_percent(found))
        for name, (suspicion, bound) in detectors(work, found, effort).items():
            areas.setdefault(name, []).append(statistics.fmean(judge(table, name, suspicion, bound, found) or [0.5]))
            table.add(name, "adaptive_evades_percent", evading(suspicion, bound, found, effort))
            add_time(table, name, suspicion, found)
    return evidence(table, areas, effort, seed)


def fooled_percent(found: Attacked) -> float:
    """Of the attacks that worked, all four together."""
    return 100 * statistics.fmean(len(e) / max(1, len(found.clean)) for e in found.examples.values())


def detectors(work: Classifier, found: Attacked, effort: Effort) -> dict[str, tuple[Suspicion, float]]:
    """Name -> suspicion and the bound above which an input is flagged, the same share of calibration pictures."""
    settings = DeepFense(steps=effort.module_steps, false_alarms=ACCEPTED)
    guards = {
        OURS: settings,
        FEWER: settings.with_(latent=1, inputs=0),
        UNTRAINED: settings.with_(latent=1, inputs=0, steps=0),
    }
    rivals = {SOFTMAX: max_softmax(work.model), SQUEEZING: squeezing(work.model, found.low, found.span)}
    return {name: (one.wrap(work.model, work).suspicion, 1.0) for name, one in guards.items()} | {
        name: (one, bound_of(one, work)) for name, one in rivals.items()
    }


def add_time(table: Table, name: str, suspicion: Suspicion, found: Attacked) -> None:
    """Note the milliseconds for one picture, the victim's own answer included."""
    with torch.inference_mode():
        table.add(name, "ms", latency.measure(lambda: suspicion(found.clean[:1]), min_seconds=0.1).median_ms)


def evidence(table: Table, areas: dict[str, list[float]], effort: Effort, seed: int) -> Evidence:
    """The rule of `experiment` on the mean areas by victim."""
    rows = table.rows()
    by_name = {row.name: row for row in rows}
    best = max(RIVALS, key=lambda name: statistics.fmean(areas[name]))
    gain = advantage(*(torch.tensor(areas[name]) for name in (best, OURS)))
    area, ours = statistics.fmean(areas[OURS]), by_name[OURS].values
    alarms = ours["false_alarm_percent"]
    holds = area >= AREA and clearly(gain) and alarms <= 100 * ALARMS * ACCEPTED
    return Evidence(
        setup=f"{effort.victims} ResNet-8 trained on {effort.pictures} pictures of Fashion-MNIST each, {effort.steps} "
        f"steps; modules trained {effort.module_steps} steps; thresholds from {effort.calibration} other pictures; "
        f"{effort.attacked} test pictures attacked by FGSM, PGD (values within {effort.eps}), DeepFool and C&W (length "
        f"of such a change), {ours['fooled_percent']:.0f}% of attacks work and only these count; seed {seed}",
        rows=rows,
        holds=bool(holds),
        figure=f"area {area:.2f}, {said(gain, 2)} over {best}; {ours['caught_percent']:.0f}% caught at "
        f"{alarms:.1f}% false alarms; an attacker who knows it passes with {ours['adaptive_evades_percent']:.0f}% of "
        f"pictures ({best}: {by_name[best].values['adaptive_evades_percent']:.0f}%)",
        limits="Small grey pictures, one small architecture, one architecture's attacks, no JSMA. The weights of the "
        "modules' loss, the aggregation by normal tails and where modules stand are reconstructed. Nothing runs on an "
        "FPGA: modules take their turn on one core.",
    )
