"""Accuracy of every class and every group of the user's before and after, with intervals that hold all at once.

Paper: What Do Compressed Deep Neural Networks Forget? (Hooker et al., 2019, arXiv 1911.05248) for the question

    d_i = right_after - right_before,   mean(d_i) over a group: Bonett and Price, at 1 - (1 - level) / groups

Groups are the labels and, in the test batches, integers (B,) under `group` or `group.<name>`. With `relative` a group
is compared with all other samples, which finds who pays more than others where all lose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import LABELLED, Change, Facts, Findings, knob
from lilliput.methods.audit._answers import Answers, AnswersAudit
from lilliput.methods.audit._judging import change_of, overall, told
from lilliput.metrics.intervals import contrast_interval, each_of, paired_share


def members(answers: Answers) -> Iterator[tuple[str, Tensor]]:
    """(name, mask (n,)) of every class and every group that occurs."""
    _, labels = answers.of_classes()
    for kind, values in {"class": labels, **answers.groups}.items():
        if values.shape != labels.shape:
            raise UserError(f"the groups {kind!r} have the shape {tuple(values.shape)}; give one integer per sample")
        yield from ((f"{kind} {value}", values == value) for value in values.unique().tolist())


@dataclass(frozen=True)
class Groups(AnswersAudit):
    """Find classes and groups of samples that lose more accuracy than is tolerated. Groups of few are never judged."""

    tolerance: float = knob(0.05, low=0.0, high=1.0, help="loss of accuracy (0.05 is 5 points) that counts as harm")
    level: float = knob(0.95, low=0.5, high=0.9999, help="confidence that all intervals hold together")
    fewest: int = knob(10, low=1, high=1_000_000, help="samples below which a group is not judged")
    relative: str = knob("no", choices=("no", "yes"), help="yes: losses beyond those of all other samples")

    facts: ClassVar[Facts] = Facts(stage="audit", data=LABELLED, effect="finds classes and groups that lose accuracy")

    def compare(self, before: Answers, after: Answers) -> Findings:
        old, new = before.right(), after.right()
        if old.shape != new.shape:
            raise UserError(f"{len(old)} answers before, {len(new)} after; use the same samples")
        groups = list(members(before))
        level = each_of(self.level, sum(int(mask.sum()) >= self.fewest for _, mask in groups))
        changes = sorted(
            (self._change(name, mask, old, new, level) for name, mask in groups), key=lambda c: c.after - c.before
        )
        return Findings(self.name(), overall(changes), told(changes, "classes and groups"), tuple(changes))

    def _change(self, name: str, mask: Tensor, old: Tensor, new: Tensor, level: float) -> Change:
        moved = new - old
        alone = self.relative == "no" or bool(mask.all())
        interval = paired_share(moved[mask], level) if alone else contrast_interval(moved[mask], moved[~mask], level)
        figures = float(old[mask].mean()), float(new[mask].mean())
        return change_of(name, *figures, interval, int(mask.sum()), self.tolerance, fewest=self.fewest)
