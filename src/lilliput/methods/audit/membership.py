"""Whether a model tells what it was trained on, before and after: attacks by loss threshold and by likelihood ratio.

Papers: Privacy Risk in Machine Learning (Yeom et al., 2018, arXiv 1709.01604); Membership Inference Attacks From First
Principles (Carlini et al., 2022, arXiv 2112.03570)

    threshold:         score = log p / (1 - p) of the label (text: the mean log-likelihood of a window)
    likelihood ratio:  log N(score; models that learned the sample) - log N(score; models that did not)

Members come from the training data, others from the test data. The likelihood ratio trains `shadows` models of the
original's architecture from scratch, each on half of both; it is strongest where the model learned no more than that.
The shadow models are not compressed, also in the attack on a compressed model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.method import LABELLED, Audit, Change, Facts, Findings, knob
from lilliput.methods.audit._answers import first_samples
from lilliput.methods.audit._attacks import confidence, likelihood_ratios, shadow_scores
from lilliput.methods.audit._judging import change_of, overall, told
from lilliput.metrics.intervals import Interval, area_change, drawn_interval, ranking_area, rate_at
from lilliput.workload import Batch, Workload

THRESHOLD, RATIO = "loss threshold", "likelihood ratio"
Scores = tuple[Tensor, Tensor]  # of members and of others


def _count(batches: list[Batch]) -> int:
    return sum(len(next(iter(b.values()))) for b in batches)


@dataclass(frozen=True)
class Membership(Audit):
    """Find models from which more can be told about their training data than from the original."""

    samples: int = knob(1000, low=2, high=10_000_000, help="test samples, and as many members, that are attacked")
    tolerance: float = knob(0.05, low=0.0, high=1.0, help="rise of an attack's area or rate that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence of each interval")
    false_rate: float = knob(0.01, low=0.0, high=0.5, help="share of others that the rate may take for members")
    fewest: int = knob(50, low=2, high=1_000_000, help="members or others below which nothing is judged")
    shadows: int = knob(0, low=0, high=10_000, help="models trained for the likelihood ratio; 0 leaves it out")
    steps: int = knob(300, low=1, high=10_000_000, help="training steps of each")
    lr: float = knob(1e-3, low=1e-6, high=1.0, log=True, help="learning rate of those steps")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds leaks about the training data")

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Training data, and labels but for text."""
        if workload.training is None:
            return ["it has no training data to tell from others; give `training`"]
        batches = next(iter(workload.training), {}), workload.test[0]
        labelled = workload.kind == "causal_lm" or all("label" in b for b in batches)
        return [] if labelled else ["its training or test data has no labels; add `label` to the batches"]

    def check(self, workload: Workload, before: Any, after: Any) -> Findings:
        self.require(workload, after)
        others = first_samples(workload.test, self.samples, "test")
        members = first_samples(workload.training or (), _count(others), "training")
        scores = [confidence(workload, model, [*members, *others]) for model in (before, after)]
        count = _count(members)
        changes = list(self._changes(THRESHOLD, *((s[:count], s[count:]) for s in scores)))
        if self.shadows:
            shadow, inside = shadow_scores(workload, [*members, *others], self.shadows, self.steps, self.lr)
            ratios = [likelihood_ratios(s, shadow, inside) for s in scores]
            changes += self._changes(RATIO, *((r[:count], r[count:]) for r in ratios))
        details = {"area_after": tuple(ranking_area(scores[1][:count], scores[1][count:], self.level))}
        return Findings(self.name(), overall(changes), told(changes, "attack figures"), tuple(changes), details)

    def _changes(self, attack: str, before: Scores, after: Scores) -> Iterator[Change]:
        """Area under the ROC curve, and true rate at the small false rate, which a few others cannot show."""
        sizes = len(before[0]), len(before[1])

        def rate(scores: Scores, picks: Scores) -> float:
            return rate_at(scores[0][picks[0]], scores[1][picks[1]], self.false_rate)

        def rise(*picks: Tensor) -> float:
            return rate(after, (picks[0], picks[1])) - rate(before, (picks[0], picks[1]))

        every = torch.arange(sizes[0]), torch.arange(sizes[1])
        areas = [ranking_area(*scores).value for scores in (before, after)]
        yield self._change(f"area, {attack}", areas, area_change(before, after, self.level), min(sizes))
        rates = [rate(scores, every) for scores in (before, after)]
        shown = self.false_rate * sizes[1] >= 1  # else a single one of the others is more than that
        fewest = self.fewest if shown else min(sizes) + 1
        yield self._change(f"rate, {attack}", rates, drawn_interval(rise, sizes, self.level), min(sizes), fewest)

    def _change(self, name: str, figures: list[float], interval: Interval, n: int, fewest: int = 0) -> Change:
        fewest = fewest or self.fewest
        return change_of(name, *figures, interval, n, self.tolerance, higher_is_better=False, fewest=fewest)
