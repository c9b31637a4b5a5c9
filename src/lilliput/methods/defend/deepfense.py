"""Doubts adversarial inputs by modules beside the model, as many as a limit of time allows.

Paper: DeepFense: Online Accelerated Defense Against Adversarial Deep Learning (Rouhani et al., 2018, arXiv 1709.02538)

    max sum_m gain_m  over sets of modules with  sum_m ms_m <= limit,   gain = area under the ROC curve - 1/2

No attack is needed to train or to set thresholds: modules learn harmless pictures, and the share of harmless ones that
may be flagged sets the bound. Modules are spread over the depth of the model, the last layer first, and each is trained
against the one before. Under a limit of time, each module's time is measured here, and its gain is the area between
calibration pictures and the same after one step along the sign of the model's gradient (that yardstick, the even
spread and the loss's weights are reconstructed). The paper's accelerator is not built; modules run one after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, knob
from lilliput.methods.defend._guarded import answered, pictures_of
from lilliput.methods.defend._redundancy import Examples, Redundancy, Redundant
from lilliput.metrics import latency
from lilliput.metrics.intervals import ranking_area
from lilliput.workload import Workload

YARDSTICK = 0.1  # of the deviation of inputs: the step that modules are compared on


@dataclass(frozen=True)
class Cost:
    """What a module costs for one picture, and what it adds: area under the ROC curve less a half."""

    ms: float
    gain: float


def best_set(costs: Sequence[Cost], limit_ms: float) -> list[int]:
    """The modules with the largest sum of gains within a limit of time; the cheapest one where none fits together."""
    choices = (c for n in range(1, len(costs) + 1) for c in itertools.combinations(range(len(costs)), n))
    fitting = [c for c in choices if sum(costs[i].ms for i in c) <= limit_ms]
    if not fitting:
        cheapest = min(one.ms for one in costs)
        raise UserError(
            f"ms is {limit_ms:g}, and the fastest module takes {cheapest:.3g}; give more, or 0 for no limit"
        )
    return list(max(fitting, key=lambda c: (sum(costs[i].gain for i in c), -sum(costs[i].ms for i in c))))


def stepped(model: nn.Module, x: Tensor, share: float = YARDSTICK) -> Tensor:
    """Inputs one step up the loss of the model's own answers, by the sign of the gradient; the step is a share of the
    deviation of all values."""
    with torch.enable_grad(), evaluating(model):
        moved = x.detach().clone().requires_grad_(True)
        logits = answered(model, moved)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(-1)), moved)
    return x + share * x.std() * slope.sign()


def costs(guarded: Redundant, x: Tensor) -> list[Cost]:
    """Time and gain of each module on harmless inputs x (B, ...), one picture at a time."""
    classes = guarded.values(x)[0].argmax(-1)
    found = []
    values = [guarded.values(part)[1] for part in (x, stepped(guarded.model, x))]
    for i, module in enumerate(guarded.watchers):
        with torch.inference_mode():
            took = latency.measure(lambda m=module: m(x[:1], classes[:1]), min_seconds=0.1)
        found.append(Cost(took.median_ms, ranking_area(values[1][i], values[0][i]).value - 0.5))
    return found


@dataclass(frozen=True)
class DeepFense(Redundancy):
    """Watch features of trained copies at several depths and the picture itself, within a limit of time."""

    ms: float = knob(0.0, low=0.0, high=1e6, help="most milliseconds that modules may add to a picture; 0: no limit")

    facts: ClassVar[Facts] = Facts(stage="serve", data=LABELLED, effect="flags adversarial inputs")
    paper: ClassVar[str] = "deepfense"

    def chosen_sites(self, model: nn.Module, places: Sequence[str], examples: Examples) -> list[str]:
        count = min(self.latent, len(places))
        spread = [places[len(places) - 1 - math.floor(i * len(places) / count)] for i in range(count)]
        return [spread[i % count] for i in range(self.latent)]

    def wrap(self, model: nn.Module, workload: Workload) -> Redundant:
        whole = super().wrap(model, workload)
        if not self.ms:
            return whole
        others = pictures_of(workload, self.name())
        kept = [whole.watchers[i] for i in best_set(costs(whole, others), self.ms)]
        return Redundant(model, kept, others, self.false_alarms)
