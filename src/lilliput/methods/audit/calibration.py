"""How sure a classifier is against how often it is right, before and after.

    ECE = sum over bins of n_b / n |confidence - accuracy|

Paper: On Calibration of Modern Neural Networks (Guo et al., 2017, arXiv 1706.04599). The interval of the change comes
from bootstrap draws of the same samples for both. Binned errors are too large where samples are few, of both alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import LABELLED, Facts, Findings, knob
from lilliput.methods.audit._answers import Answers, AnswersAudit
from lilliput.methods.audit._judging import change_of, overall, told
from lilliput.metrics.intervals import drawn_interval
from lilliput.metrics.quality import confidence_gaps, reliability

NAME = "calibration error"


def binned_error(gaps: Tensor, places: Tensor, bins: int) -> float:
    """ECE from the gaps confidence - right (n,) and their bins: the sizes of the bins' sums, over n."""
    return float(torch.bincount(places, gaps, minlength=bins).abs().sum()) / len(gaps)


@dataclass(frozen=True)
class Calibration(AnswersAudit):
    """Find models whose confidence became a worse guide. The details hold the data of both reliability diagrams."""

    tolerance: float = knob(0.02, low=0.0, high=1.0, help="rise of the calibration error that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence of the interval")
    bins: int = knob(15, low=1, high=1000, help="bins of equal width that confidences fall in")
    fewest: int = knob(100, low=1, high=1_000_000, help="samples below which nothing is judged")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds confidence that misleads")

    def compare(self, before: Answers, after: Answers) -> Findings:
        (old, labels), (new, _) = before.of_classes(), after.of_classes()
        if old.shape != new.shape:
            raise UserError(f"logits {tuple(old.shape)} before, {tuple(new.shape)} after; use the same samples")
        found = [confidence_gaps(x, labels, self.bins) for x in (old, new)]
        parts = [(confidence - right, places) for confidence, right, places in found]

        def rise(picks: Tensor, _: Tensor) -> float:
            first, second = (binned_error(gaps[picks], places[picks], self.bins) for gaps, places in parts)
            return second - first

        interval = drawn_interval(rise, (len(labels), 1), self.level)
        errors = [binned_error(*part, self.bins) for part in parts]
        change = change_of(
            NAME, *errors, interval, len(labels), self.tolerance, higher_is_better=False, fewest=self.fewest
        )
        details = {name: _diagram(x, labels, self.bins) for name, x in (("before", old), ("after", new))}
        return Findings(self.name(), overall([change]), told([change], "calibration error"), (change,), details)


def _diagram(logits: Tensor, labels: Tensor, bins: int) -> dict[str, list[Any]]:
    """The reliability diagram as lists, one entry per bin that is not empty; `upto` is its upper end."""
    counts, confidence, accuracy = reliability(logits, labels, bins)
    ends = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    columns = {"upto": ends, "samples": counts, "confidence": confidence, "accuracy": accuracy}
    return {name: column[counts > 0].tolist() for name, column in columns.items()}
