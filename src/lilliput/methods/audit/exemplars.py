"""Which examples a compressed model answers otherwise: compression-identified exemplars.

Paper: Characterising Bias in Compressed Models (Hooker et al., 2020, arXiv 2010.03058)

    exemplar:  the answer that most of the compressed models give differs from that of most of the originals

With one model on either side these are the flipped answers. With models of several seeds the votes leave out what
chance changes; two halves of the originals (`chance` in the details) show how much of it is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import LABELLED, Change, Facts, Findings, knob
from lilliput.methods.audit._answers import Answers, AnswersAudit, Given, answers
from lilliput.methods.audit._judging import share_change
from lilliput.workload import Workload

NAME = "changed answers"
LISTED = 50  # exemplars named in the details


def modal_answers(logits: Sequence[Tensor]) -> Tensor:
    """(n,) the class that most models answer, from logits (n, classes) of each; the mean probability decides ties."""
    votes = torch.stack([F.one_hot(x.argmax(-1), x.shape[-1]).double() for x in logits]).sum(0)
    sure = torch.stack([x.double().softmax(-1) for x in logits]).mean(0)
    return (votes + sure / 2).argmax(-1)


def exemplars(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """(n,) whether the modal answers differ."""
    shapes = {tuple(x.shape) for x in (*before, *after)}
    if len(shapes) != 1:
        raise UserError(f"the models' logits have the shapes {sorted(shapes)}; use the same samples and classes")
    return modal_answers(before) != modal_answers(after)


@dataclass(frozen=True)
class Exemplars(AnswersAudit):
    """Find the examples whose answer changed, how hard they were before, and the classes they come from."""

    tolerance: float = knob(0.05, low=0.0, high=1.0, help="share of changed answers that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence of the interval")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds examples that are answered otherwise")
    paper: ClassVar[str] = "characterising_bias"

    def check(self, workload: Workload, before: Any, after: Any, given: Given | None = None) -> Findings:
        """Compare two models, or two sequences of models."""
        if given is not None:
            return super().check(workload, before, after, given)
        self.require(workload, after)
        return self.compare_many(*([answers(workload, m) for m in _several(side)] for side in (before, after)))

    def compare(self, before: Answers, after: Answers) -> Findings:
        return self.compare_many([before], [after])

    def compare_many(self, before: Sequence[Answers], after: Sequence[Answers]) -> Findings:
        """Compare the answers of several originals with those of several compressed models."""
        if not before or not after:
            raise UserError(f"{len(before)} models before and {len(after)} after; give at least one of each")
        old, new = ([a.of_classes()[0] for a in side] for side in (before, after))
        labels, changed = before[0].of_classes()[1], exemplars(old, new)
        change = share_change(NAME, int(changed.sum()), len(changed), self.tolerance, self.level)
        details = _details(changed, labels, modal_answers(old), modal_answers(new))
        if len(old) > 1:
            details["chance"] = float(exemplars(old[::2], old[1::2]).double().mean())
        return Findings(self.name(), change.verdict, _sentence(change, details), (change,), details)


def _several(models: Any) -> list[Any]:
    return list(models) if isinstance(models, list | tuple) else [models]


def _details(changed: Tensor, labels: Tensor, old: Tensor, new: Tensor) -> dict[str, Any]:
    """Where the exemplars are, and the share of right answers of the originals on them and on all others."""
    right, still = old == labels, new == labels
    by_class = {str(c): int(changed[labels == c].sum()) for c in labels[changed].unique().tolist()}
    return {
        "indices": changed.nonzero().flatten()[:LISTED].tolist(),
        "by_class": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "accuracy_on_exemplars": _mean(right[changed]),
        "accuracy_on_others": _mean(right[~changed]),
        "became_wrong": _mean(right & ~still),
        "became_right": _mean(still & ~right),
    }


def _mean(mask: Tensor) -> float | None:
    return float(mask.double().mean()) if len(mask) else None


def _sentence(change: Change, details: dict[str, Any]) -> str:
    text = f"{change.after:.2%} of {change.n} answers changed [{change.low:.2%}, {change.high:.2%}]"
    hard, easy = details["accuracy_on_exemplars"], details["accuracy_on_others"]
    if hard is not None and easy is not None:
        text += f"; the original was right on {hard:.0%} of these and on {easy:.0%} of the others"
    return text + "."
