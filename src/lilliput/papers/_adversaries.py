"""What experiments on detectors of adversarial inputs share: victims, attacks that worked, simple detectors, and the
attacker who knows the detector."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.audit._adversarial import ATTACKS, UnitInput, crafted
from lilliput.methods.audit._pictures import channel_limits
from lilliput.metrics.intervals import ranking_area
from lilliput.papers._pictures import Table
from lilliput.papers._small_nets import drawn, small_net, trained
from lilliput.workload import Classifier, Workload
from lilliput.zoo.images import Pictures

Suspicion = Callable[[Tensor], tuple[Tensor, Tensor]]  # inputs -> logits and scores, with gradients
ACCEPTED = 0.05  # share of harmless inputs that may be flagged


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    victims: int
    pictures: int
    steps: int  # of a victim's training
    calibration: int
    attacked: int  # test pictures
    eps: float
    attack_steps: int
    adaptive_steps: int
    module_steps: int


def victim(
    splits: dict[str, Pictures], effort: Effort, seed: int, build: Callable[[int], nn.Module] = small_net
) -> Classifier:
    """A trained network with its own training pictures, pictures for thresholds, and test pictures."""
    training = drawn(splits["training"], effort.pictures, seed)
    model = trained(training, effort.steps, seed, build=build)
    parts = (splits["calibration"].first(effort.calibration), splits["validation"].first(64),
             splits["test"].first(effort.attacked))  # fmt: skip
    return Workload.classifier(model, *(list(p.batches(100)) for p in parts), training=list(training.batches(100)))


@dataclass(frozen=True)
class Attacked:
    """Test inputs that a victim answers rightly, their labels, of each attack the examples that fooled it, and all test
    inputs, rightly answered or not; the range of inputs."""

    clean: Tensor
    labels: Tensor
    examples: dict[str, Tensor]
    every: Tensor
    low: Tensor
    span: Tensor


def attacked(work: Classifier, effort: Effort) -> Attacked:
    """Attack a victim on its test pictures; what it gets wrong anyway does not count, nor do failed attacks."""
    low, high = channel_limits(list(work.test))
    inside = UnitInput(work, work.model, low, high)
    x, labels = (torch.cat([batch[key] for batch in work.test]) for key in ("input", "label"))
    with torch.inference_mode():
        right = work.model(x).argmax(-1) == labels
    every, x, labels = x, x[right], labels[right]
    examples = {}
    for attack in ATTACKS:
        made = inside.whole(crafted(inside, inside.unit(x), labels, attack, effort.eps, effort.attack_steps))
        with torch.inference_mode():
            examples[attack] = made[work.model(made).argmax(-1) != labels]
    return Attacked(x, labels, examples, every, low, high - low)


# --- detectors -------------------------------------------------------------------------------------------------


def max_softmax(model: nn.Module) -> Suspicion:
    """How far the largest probability is from 1."""

    def suspicion(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits, 1 - logits.softmax(-1).amax(-1)

    return suspicion


def squeezing(model: nn.Module, low: Tensor, span: Tensor, levels: int = 8) -> Suspicion:
    """The larger distance of probabilities when the picture has few levels, or medians of 2x2 values.

    Paper: Feature Squeezing (Xu et al., 2017, arXiv 1704.01155)
    """

    def suspicion(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        coarse = ((x - low) / span * (levels - 1)).round() / (levels - 1) * span + low
        around = F.pad(x, (0, 1, 0, 1), mode="replicate").unfold(2, 2, 1).unfold(3, 2, 1)
        smooth = around.flatten(4).median(-1).values
        p = logits.softmax(-1)
        apart = [(p - model(other).softmax(-1)).abs().sum(-1) for other in (coarse, smooth)]
        return logits, torch.stack(apart).amax(0)

    return suspicion


@torch.no_grad()
def bound_of(suspicion: Suspicion, work: Classifier) -> float:
    """The score that a share ACCEPTED of the calibration pictures exceeds."""
    scores = torch.cat([suspicion(batch["input"])[1] for batch in work.calibration])
    return max(float(scores.quantile(1 - ACCEPTED)), 1e-12)


# --- judging ---------------------------------------------------------------------------------------------------


def judge(table: Table, name: str, suspicion: Suspicion, bound: float, found: Attacked) -> list[float]:
    """Note areas, caught shares and false alarms on test pictures of one victim; the areas in the order of ATTACKS."""
    with torch.no_grad():
        calm, every = (suspicion(x)[1] for x in (found.clean, found.every))
        areas, caught = [], []
        for attack in ATTACKS:
            if len(found.examples[attack]) < 2:
                continue
            scores = suspicion(found.examples[attack])[1]
            areas.append(ranking_area(scores, calm).value)
            caught.append(float((scores > bound).double().mean()))
            table.add(name, f"area_{attack}", areas[-1])
    table.add(name, "caught_percent", 100 * statistics.fmean(caught or [0.0]))
    table.add(name, "false_alarm_percent", 100 * float((every > bound).double().mean()))
    return areas


def evading(suspicion: Suspicion, bound: float, found: Attacked, effort: Effort) -> float:
    """Percent of rightly answered pictures that an attacker who knows the detector makes wrong without an alarm.

    Signed steps on both aims at once: the margin of the right class, and the score above nine tenths of the bound.
    """
    x, eps = found.clean, effort.eps * found.span
    step, moved = 2.5 * eps / effort.adaptive_steps, found.clean.clone()
    done = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(effort.adaptive_steps):
        moved.requires_grad_(True)
        logits, scores = suspicion(moved)
        own = logits.gather(1, found.labels.view(-1, 1)).squeeze(1)
        other = logits.scatter(1, found.labels.view(-1, 1), -torch.inf).amax(1)
        done |= (other > own) & (scores <= bound)
        aim = (own - other + 0.1).clamp_min(0) + (scores / bound - 0.9).clamp_min(0)
        (slope,) = torch.autograd.grad(aim.sum(), moved)
        moved = (moved.detach() - step * slope.sign()).clamp(x - eps, x + eps)
        moved = torch.minimum(torch.maximum(moved, found.low), found.low + found.span)
    with torch.no_grad():
        logits, scores = suspicion(moved)
    done |= (logits.argmax(-1) != found.labels) & (scores <= bound)
    return 100 * float(done.double().mean())
