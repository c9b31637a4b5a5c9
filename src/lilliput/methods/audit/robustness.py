"""Accuracy under adversarial attacks by FGSM, PGD, DeepFool and Carlini & Wagner, before and after.

Papers: those of the attacks (arXiv 1412.6572, 1706.06083, 1511.04599, 1608.04644); Obfuscated Gradients Give a False
Sense of Security (Athalye et al., 2018, arXiv 1802.00420) for the question whether gradients can be trusted.

    d_i = (right_after - right_before under attack) - (the same on the picture as it is)

Each model is attacked through its own gradients by the Adversarial Robustness Toolbox, an extra: pip install
'lilliput[attacks]'. Integer weights have no gradient: it is passed straight through their rounding, as of the weights
that the codes stand for, and every example is judged on the model itself. Rounding can hide a slope from the attacks
on itself without any gain in safety. So `pgd from the original` shows examples made on the original, and `any of these`
counts a picture only when a model withstands every example made on either model; both are judged on the same ones.
Inputs are mapped to 0 .. 1 by each channel's smallest and largest value in the test data, and back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.method import LABELLED, UNSURE, Audit, Change, Facts, Findings, knob
from lilliput.methods.audit._adversarial import ATTACKS, UnitInput, crafted, integer_layers, without_toolbox
from lilliput.methods.audit._answers import first_samples
from lilliput.methods.audit._judging import change_of, overall, told
from lilliput.methods.audit._pictures import channel_limits, needs_pictures, rights
from lilliput.metrics.intervals import each_of, paired_share
from lilliput.workload import Batch, Workload

TRANSFERRED, ANY = "pgd from the original", "any of these"
Examples = dict[str, list[Batch]]  # attack -> changed batches


@dataclass(frozen=True)
class Robustness(Audit):
    """Find attacks that a model withstands less than the original did, beyond what it lost on clean pictures."""

    eps: float = knob(0.01, low=1e-5, high=1.0, log=True, help="largest change of a value, of a range of 1")
    samples: int = knob(100, low=1, high=10_000_000, help="test pictures that are attacked")
    steps: int = knob(20, low=1, high=10_000, help="steps of the iterated attacks")
    tolerance: float = knob(0.05, low=0.0, high=1.0, help="further loss of accuracy that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence that all intervals hold together")
    fewest: int = knob(30, low=1, high=1_000_000, help="pictures below which nothing is judged")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds lost robustness to attacks")

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Labelled pictures (B, C, H, W) under `input`, a module, and the toolbox."""
        reasons = needs_pictures(workload)
        if not isinstance(model, nn.Module):
            reasons.append("it needs gradients; give the module, not a session")
        return reasons + [str(error) for error in [without_toolbox()] if error]

    def check(self, workload: Workload, before: Any, after: Any) -> Findings:
        self.require(workload, before)
        self.require(workload, after)
        batches = first_samples(workload.test, self.samples, "test")
        limits = channel_limits(batches)
        models = before, after
        examples = [self._examples(UnitInput(workload, m, *limits), batches) for m in models]
        clean = [rights(workload, m, batches) for m in models]
        own = {a: [rights(workload, m, e[a]) for m, e in zip(models, examples)] for a in ATTACKS}
        crossed = {a: [rights(workload, m, e[a]) for m, e in zip(models, examples[::-1])] for a in ATTACKS}
        level = each_of(self.level, len(ATTACKS) + 1)
        changes = [self._change(a, clean, own[a], level) for a in ATTACKS]
        either = [torch.stack([c, *(f[a][i] for f in (own, crossed) for a in ATTACKS)]).amin(0)
                  for i, c in enumerate(clean)]  # fmt: skip
        changes.append(self._change(ANY, clean, either, level))
        changes.sort(key=lambda c: c.low + c.high)
        moved, masked = self._transferred(own["pgd"], crossed["pgd"][1])
        details = {
            "clean": [float(c.mean()) for c in clean],
            "eps": self.eps,
            "integer_layers": integer_layers(after),
            "masked": masked,
        }
        summary = self._summary(changes, moved, details)
        return Findings(self.name(), overall(changes), summary, (*changes, moved), details)

    def _examples(self, model: UnitInput, batches: list[Batch]) -> Examples:
        made: Examples = {attack: [] for attack in ATTACKS}
        for batch in batches:
            x = model.unit(batch["input"])
            model.needs_gradient(x)
            for attack in ATTACKS:
                found = crafted(model, x, batch["label"], attack, self.eps, self.steps)
                made[attack].append(batch | {"input": model.whole(found)})
        return made

    def _change(self, name: str, clean: list[Tensor], attacked: list[Tensor], level: float) -> Change:
        """Nothing can be told where the original itself is left with less than the harm that is looked for."""
        further = (attacked[1] - attacked[0]) - (clean[1] - clean[0])
        accuracies = [float(r.mean()) for r in attacked]
        interval = paired_share(further, level, bound=2.0)
        found = change_of(name, *accuracies, interval, len(further), self.tolerance, fewest=self.fewest)
        return found if accuracies[0] > self.tolerance else dataclasses.replace(found, verdict=UNSURE)

    def _transferred(self, own: list[Tensor], moved: Tensor) -> tuple[Change, bool]:
        """Both models on the original's examples, and whether these fool the changed one more than its own do."""
        interval = paired_share(moved - own[0], self.level)
        change = Change(TRANSFERRED, float(own[0].mean()), float(moved.mean()), *interval[1:], len(moved))
        return change, paired_share(own[1] - moved, self.level).low > 0

    def _summary(self, changes: list[Change], moved: Change, details: dict[str, Any]) -> str:
        shares = (f"{c.name} {c.before:.3g} -> {c.after:.3g} [{c.low:+.2g}, {c.high:+.2g}]" for c in (*changes, moved))
        parts = [told(changes, "attacks"), f"Right, and the interval of the further change: {', '.join(shares)}."]
        if any(c.before <= self.tolerance for c in changes):
            parts.append("The original itself falls to some of them: a smaller eps would tell more.")
        if details["integer_layers"]:
            parts.append(
                f"Integer weights of {details['integer_layers']} layers have no gradient: it was passed straight "
                "through their rounding, and all examples were judged on the model itself."
            )
        if details["masked"]:
            parts.append(
                f"Examples made on the original fool the changed model more than its own do ({moved.after:.3g} right): "
                "its gradients mislead the attacks on it, and its own rows look too good."
            )
        return " ".join(parts)
