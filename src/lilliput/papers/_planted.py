"""Does an audit find a harm that was planted, and none where there is none? Networks pruned and healed on all classes,
and healed without one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lilliput.method import HARM, Findings
from lilliput.methods.audit.exemplars import Exemplars
from lilliput.methods.audit.groups import Groups
from lilliput.methods.prune.magnitude import Magnitude
from lilliput.paper import Row
from lilliput.papers._small_nets import BATCH, picked
from lilliput.workload import Workload
from lilliput.zoo.images import Pictures

SPARSITY, STEPS, LR = 0.3, 60, 3e-4  # of a pruning that costs next to nothing
TOLERANCE = 0.1  # healing on all classes alone moves the accuracy of one by up to 7 points, as other seeds showed
CLASSES = 10
PLANTED, CLEAN = "audits, healed without one class", "audits, healed on all classes"


@dataclass(frozen=True)
class Checked:
    """What the audits say of one network with a class left out, and of the same healed on all of them."""

    left_out: int
    groups: Findings
    exemplars: Findings
    clean: Findings

    @property
    def loss_points(self) -> float:
        """Accuracy that the class left out lost."""
        change = self.groups.change(f"class {self.left_out}")
        return 100 * (change.before - change.after)

    @property
    def found(self) -> bool:
        return self.groups.change(f"class {self.left_out}").verdict == HARM

    @property
    def exemplars_of_it_percent(self) -> float:
        """Share of the changed answers that were to pictures of that class."""
        by_class = self.exemplars.details["by_class"]
        return 100 * by_class.get(str(self.left_out), 0) / max(1, sum(by_class.values()))


def checked(model: nn.Module, training: Pictures, test: Pictures, seed: int) -> Checked:
    """Prune a network twice, alike but for the pictures of one class, which the seed chooses, and audit both."""
    judge = Groups(tolerance=TOLERANCE)
    left_out = (3 * seed + 1) % CLASSES
    healed = {
        kind: healed_on(model, pictures, test)
        for kind, pictures in {"all": training, "some": picked(training, training.labels != left_out)}.items()
    }
    work, some = healed["some"]
    groups, exemplars = (audit.check(work, model, some) for audit in (judge, Exemplars()))
    return Checked(left_out, groups, exemplars, judge.check(work, model, healed["all"][1]))


def healed_on(model: nn.Module, pictures: Pictures, test: Pictures) -> tuple[Workload, nn.Module]:
    """A network pruned while it is trained on pictures, and the workload that did it."""
    batches, judged = list(pictures.batches(BATCH)), list(test.batches(500))
    work = Workload.classifier(model, batches[:1], batches[:1], judged, training=batches)
    return work, Magnitude(sparsity=SPARSITY, steps=STEPS, lr=LR).apply(model, work)


def rows(found: Sequence[Checked]) -> list[Row]:
    """How often the planted harm was found, and harm where none was planted; no rows of no networks."""
    if not found:
        return []
    losses = [one.loss_points for one in found]
    planted = {
        "found_percent": 100 * statistics.fmean(one.found for one in found),
        "loss_of_that_class_points": statistics.fmean(losses),
        "exemplars_of_that_class_percent": statistics.fmean(one.exemplars_of_it_percent for one in found),
    }
    worst = [100 * max(c.before - c.after for c in one.clean.changes) for one in found]
    alarms = [one.clean.verdict == HARM for one in found]
    clean = {"false_alarms_percent": 100 * statistics.fmean(alarms), "largest_loss_points": statistics.fmean(worst)}
    return [Row(PLANTED, planted), Row(CLEAN, clean)]


def sound(found: Sequence[Checked]) -> bool:
    """Whether every planted harm was found and nothing else."""
    return all(one.found and one.clean.verdict != HARM for one in found)
