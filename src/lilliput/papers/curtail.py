"""CuRTAIL: do measures of what training data left unexplored tell where modules that notice attacks should stand?"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch
from torch import nn

from lilliput.fitting.predict import rank_correlation
from lilliput.methods.defend._redundancy import Examples, Redundant, examples_of, latent_modules, sites
from lilliput.methods.defend.curtail import Curtail, vulnerability_report
from lilliput.paper import Evidence, Paper
from lilliput.papers._adversaries import (
    Attacked,
    Effort,
    attacked,
    bound_of,
    evading,
    judge,
    max_softmax,
    victim,
)
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage
from lilliput.papers._pictures import Table
from lilliput.workload import Classifier
from lilliput.zoo import images, nets

paper = Paper(
    title="CuRTAIL: ChaRacterizing and Thwarting AdversarIal deep Learning",
    authors="Bita Darvish Rouhani, Mohammad Samragh, Tara Javidi, Farinaz Koushanfar",
    year=2017,
    arxiv="1709.02538",
    claim="Measures of the space that training data left unexplored in a model's layers tell where it can be attacked; "
    "redundant modules placed there detect several attacks at a chosen share of false alarms.",
    methods=("defend.curtail",),
)

TOP, LAST, RANDOM, BEST, SOFTMAX = (
    "most vulnerable layer", "last layer", "random layer", "best layer (knows the attacks)", "largest probability"
)  # fmt: skip
RIVALS = (LAST, RANDOM, SOFTMAX)
SHARES = (0.01, 0.05, 0.1)  # accepted false alarms that are tried

DEFAULT = Effort(victims=3, pictures=4000, steps=240, calibration=800, attacked=150, eps=0.05, attack_steps=10,
                 adaptive_steps=40, module_steps=50)  # fmt: skip
FULL = Effort(victims=6, pictures=20_000, steps=1200, calibration=1000, attacked=1000, eps=0.05, attack_steps=40,
              adaptive_steps=200, module_steps=600)  # fmt: skip


@dataclass
class Found:
    """Of each victim the mean area under the ROC curve, by contender."""

    areas: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, area: float) -> None:
        """Another victim's area."""
        self.areas.setdefault(name, []).append(area)


def deeper_net(seed: int) -> nn.Module:
    """A ResNet of 14 layers: six blocks and a head."""
    torch.manual_seed(seed)
    return nets.resnet(width=8, depth=14, stem_stride=2)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """One module at each layer in turn, against the order that the measures give without any attack.

    Holds when the area of the module at the most vulnerable layer, the mean of four attacks, is more than twice the
    standard error over victims above each rival's: the last layer's, the mean of all layers, the largest probability.
    """
    effort = FULL if full else DEFAULT
    splits, table, found = images.fashion_mnist(), Table(), Found()
    for number in range(effort.victims):
        work = victim(splits, effort, 1000 * seed + number, deeper_net)
        one_victim(work, attacked(work, effort), effort, table, found)
    return evidence(table, found, effort, seed)


def one_victim(work: Classifier, hit: Attacked, effort: Effort, table: Table, found: Found) -> None:
    """Note what a module at each of a victim's layers sees, and what the measures said of the layers before."""
    settings = Curtail(steps=effort.module_steps)
    places = sites(work.model, settings.name())
    examples = examples_of(work, work.model, settings.examples, settings.name())
    ranked = vulnerability_report(work.model, places, examples)
    guards = {site: one_module(work, site, places[-1], examples, settings) for site in places}
    areas = {site: mean(judge(Table(), site, guard.suspicion, 1.0, hit)) for site, guard in guards.items()}
    chosen = {TOP: ranked[0].site, LAST: places[-1], BEST: max(places, key=lambda site: areas[site])}
    plain = max_softmax(work.model)
    suspicions = {name: (guards[site].suspicion, 1.0) for name, site in chosen.items()}
    for name, (suspicion, bound) in (suspicions | {SOFTMAX: (plain, bound_of(plain, work))}).items():
        found.note(name, mean(judge(table, name, suspicion, bound, hit)))
        table.add(name, "adaptive_evades_percent", evading(suspicion, bound, hit, effort))
    found.note(RANDOM, mean(list(areas.values())))
    table.add(RANDOM, "area_mean", mean(list(areas.values())))
    ranks = {v.site: -v.rank for v in ranked}
    correlation = rank_correlation([ranks[site] for site in places], [areas[site] for site in places])
    table.add(TOP, "rank_correlation", correlation or 0.0)
    add_alarms(table, work, guards[ranked[0].site], examples, hit)


def one_module(work: Classifier, site: str, head: str, examples: Examples, settings: Curtail) -> Redundant:
    """The victim with one latent module at a site."""
    modules = latent_modules(work.model, [site], head, examples, settings)
    return Redundant(work.model, modules, examples.others, settings.false_alarms)


def add_alarms(table: Table, work: Classifier, guard: Redundant, examples: Examples, hit: Attacked) -> None:
    """Note the test pictures that are flagged at each accepted share."""
    for share in SHARES:
        anew = Redundant(work.model, list(guard.watchers), examples.others, share)
        alarms = anew.inspect(hit.every).flagged.double().mean()
        table.add(TOP, key(share), 100 * float(alarms))


def key(share: float) -> str:
    """The quantity's name."""
    return f"alarms_at_{round(100 * share)}_percent"


def mean(values: list[float]) -> float:
    """Of areas; chance where no attack worked."""
    return statistics.fmean(values or [0.5])


def evidence(table: Table, found: Found, effort: Effort, seed: int) -> Evidence:
    """The rule of `experiment` on the mean areas by victim."""
    rows = table.rows()
    by_name = {row.name: row for row in rows}
    gains = {name: advantage(*(torch.tensor(found.areas[n]) for n in (name, TOP))) for name in (*RIVALS, BEST)}
    top = by_name[TOP].values
    over = "; ".join(f"{said(gains[name], 3)} over {name}" for name in (*RIVALS, BEST))
    return Evidence(
        setup=f"{effort.victims} ResNet-14 trained on {effort.pictures} pictures of Fashion-MNIST each, {effort.steps} "
        f"steps; one module trained {effort.module_steps} steps at each of seven layers in turn; "
        f"{effort.attacked} test pictures attacked by FGSM, PGD (values within {effort.eps}), DeepFool and C&W (length "
        f"of such a change), only attacks that work count; seed {seed}",
        rows=rows,
        holds=all(clearly(gains[name]) for name in RIVALS),
        figure=f"area at the most vulnerable layer {statistics.fmean(found.areas[TOP]):.3f}: {over}; rank correlation "
        f"of measure and area {top['rank_correlation']:+.2f}; alarms on test pictures "
        f"{', '.join(f'{top[key(share)]:.1f}% at {share:.0%}' for share in SHARES)}",
        limits="The three measures and the mean of their ranks are reconstructed, as are the modules' loss and density "
        "function. Seven layers of one small architecture on small grey pictures; no JSMA; nothing runs in parallel.",
    )
