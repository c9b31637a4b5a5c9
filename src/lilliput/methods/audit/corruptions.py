"""Accuracy on pictures with noise, blur, less contrast, more brightness, coarse pixels and JPEG, before and after.

Papers: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks & Dietterich, 2019,
arXiv 1903.12261) for the kinds; What Do Compressed Deep Neural Networks Forget? (Hooker et al., 2019, arXiv
1911.05248) for the question.

    d_i = (right_after - right_before on the worse picture) - (the same on the picture as it is)

so that what was lost on clean pictures already is not counted again. Inputs are mapped to 0 .. 1 by each channel's
smallest and largest value in the test data, and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lilliput.method import LABELLED, Audit, Change, Facts, Findings, knob
from lilliput.methods.audit._answers import first_samples
from lilliput.methods.audit._judging import change_of, overall, told
from lilliput.methods.audit._pictures import KINDS, channel_limits, corrupt, needs_pictures, rights
from lilliput.metrics.intervals import each_of, paired_share
from lilliput.workload import Workload


@dataclass(frozen=True)
class Corruptions(Audit):
    """Find kinds of worse pictures on which a model loses more accuracy than it lost on clean ones."""

    severity: int = knob(3, low=1, high=5, help="how much worse the pictures are")
    samples: int = knob(1000, low=1, high=10_000_000, help="test pictures to look at")
    tolerance: float = knob(0.05, low=0.0, high=1.0, help="further loss of accuracy that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence that all intervals hold together")
    fewest: int = knob(30, low=1, high=1_000_000, help="pictures below which nothing is judged")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds lost robustness to worse pictures")

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Labelled pictures (B, C, H, W) under `input`."""
        return needs_pictures(workload)

    def check(self, workload: Workload, before: Any, after: Any) -> Findings:
        self.require(workload, after)
        batches = first_samples(workload.test, self.samples, "test")
        low, high = channel_limits(batches)
        clean = [rights(workload, m, batches) for m in (before, after)]
        level, changes = each_of(self.level, len(KINDS)), []
        for kind in KINDS:
            worse = [b | {"input": self._corrupted(b["input"], kind, low, high, i)} for i, b in enumerate(batches)]
            changes.append(self._change(kind, clean, [rights(workload, m, worse) for m in (before, after)], level))
        changes.sort(key=lambda c: c.low + c.high)
        details = {"clean": [float(r.mean()) for r in clean], "severity": self.severity}
        return Findings(self.name(), overall(changes), told(changes, "corruptions"), tuple(changes), details)

    def _corrupted(self, x: Tensor, kind: str, low: Tensor, high: Tensor, seed: int) -> Tensor:
        span = (high - low).clamp_min(1e-12)
        return corrupt((x - low) / span, kind, self.severity, seed) * span + low

    def _change(self, kind: str, clean: list[Tensor], worse: list[Tensor], level: float) -> Change:
        further = (worse[1] - worse[0]) - (clean[1] - clean[0])
        accuracies = [float(r.mean()) for r in worse]
        interval = paired_share(further, level, bound=2.0)
        return change_of(kind, *accuracies, interval, len(further), self.tolerance, fewest=self.fewest)
