"""Doubts adversarial inputs by modules at the layers whose space training data explored least.

Paper: CuRTAIL: ChaRacterizing and Thwarting AdversarIal deep Learning (Rouhani et al., 2017, arXiv 1709.02538)

    unexplored:   1 - (sum_i l_i)^2 / (d sum_i l_i^2),  l the variances of a layer's d features along their directions
    overlap:      spread within classes / spread of all
    sensitivity:  share of answers that change when features move along directions of small variance

A layer's vulnerability is its mean rank under the three (the measures and their mean are reconstructed). Modules stand
at the most vulnerable layers and are those of `defend.deepfense`. The report uses harmless data alone, no attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, knob
from lilliput.methods.defend._guarded import answered
from lilliput.methods.defend._redundancy import Examples, Redundancy, examples_of, features_at, sites
from lilliput.workload import Workload

MOVE = 1.0  # length of a move, in root mean squares of the layer's values
LOW = 0.5  # share of the directions, those of least variance, that moves are drawn from


@dataclass(frozen=True)
class Vulnerability:
    """What speaks for attacks at one site; `rank` is the mean rank of the three, the most vulnerable first."""

    site: str
    unexplored: float
    overlap: float
    sensitivity: float
    rank: float = 0.0


def unexplored(features: Tensor) -> float:
    """1 less the effective share of dimensions that features (n, d) fill: 0 when all directions vary alike."""
    variances = torch.linalg.svdvals(features.double() - features.double().mean(0)).square()
    filled = variances.sum().square() / variances.square().sum().clamp_min(1e-300)
    return 1 - float(filled) / features.shape[1]


def overlap(features: Tensor, labels: Tensor) -> float:
    """Variance within classes, as a share of all; features (n, d)."""
    x = features.double()
    within = sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in labels.unique())
    return within / max(float((x - x.mean(0)).square().sum()), 1e-300)


@torch.no_grad()
def sensitivity(model: nn.Module, site: str, head: str, x: Tensor, features: Tensor, seed: int = 0) -> float:
    """Share of answers to x (n, ...) that change when what the site gives moves along a direction in which features
    (n, d) vary little, everywhere in the picture alike."""
    vectors = torch.linalg.svd(features - features.mean(0), full_matrices=True).Vh
    low = vectors[int(len(vectors) * (1 - LOW)) :]
    generator = torch.Generator().manual_seed(seed)
    move = torch.randn(len(low), generator=generator).to(features) @ low
    move = move / move.norm() * len(move) ** 0.5

    def moved(values: Tensor) -> Tensor:
        shape = (-1, 1, 1) if values.ndim == 4 else (-1,)
        return values + MOVE * values.square().mean().sqrt() * move.view(shape)

    def change(layer: nn.Module, args: tuple, out: Any = None) -> Any:
        if out is None:
            return (moved(args[0]), *args[1:])
        return (moved(out[0]), *out[1:]) if isinstance(out, tuple) else moved(out)

    layer = model.get_submodule(site)
    with evaluating(model):
        before = answered(model, x).argmax(-1)
        handle = layer.register_forward_pre_hook(change) if site == head else layer.register_forward_hook(change)
        try:
            after = answered(model, x).argmax(-1)
        finally:
            handle.remove()
    return float((before != after).double().mean())


def vulnerability_report(model: nn.Module, places: Sequence[str], examples: Examples) -> list[Vulnerability]:
    """Every site with its measures, the most vulnerable first; the later one of equals."""
    found = []
    x, labels = examples.inputs[:1000], examples.labels[:1000]
    for site in places:
        with torch.no_grad(), evaluating(model):
            features = torch.cat([features_at(model, site, places[-1], part) for part in x.split(128)])
        moved = sensitivity(model, site, places[-1], x[:256], features)
        found.append(Vulnerability(site, unexplored(features), overlap(features, labels), moved))
    measures = torch.tensor([[v.unexplored, v.overlap, v.sensitivity] for v in found], dtype=torch.float64)
    above = (measures.unsqueeze(0) > measures.unsqueeze(1)).double() + (
        measures.unsqueeze(0) == measures.unsqueeze(1)
    ) / 2
    ranks = above.sum(1).mean(1).tolist()
    ranked = [Vulnerability(v.site, v.unexplored, v.overlap, v.sensitivity, r) for v, r in zip(found, ranks)]
    ranked.reverse()
    return sorted(ranked, key=lambda v: v.rank)


def report(model: nn.Module, workload: Workload, most: int = 1000) -> list[Vulnerability]:
    """The vulnerability of a model's layers on a workload's training data. Raises UserError for too little of it."""
    return vulnerability_report(
        model, sites(model, "defend.curtail"), examples_of(workload, model, most, "defend.curtail")
    )


@dataclass(frozen=True)
class Curtail(Redundancy):
    """Watch features of trained copies at the most vulnerable layers, and the picture itself."""

    latent: int = knob(1, low=0, high=16, help="modules, each at one of the most vulnerable layers")

    facts: ClassVar[Facts] = Facts(stage="serve", data=LABELLED, effect="flags adversarial inputs")
    paper: ClassVar[str] = "curtail"

    def chosen_sites(self, model: nn.Module, places: Sequence[str], examples: Examples) -> list[str]:
        ranked = [v.site for v in vulnerability_report(model, places, examples)]
        return [ranked[i % len(ranked)] for i in range(self.latent)]
