"""What a change did to the answers beyond the average score: flips, classes, calibration, tokens, pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lilliput.errors import UserError


class Difference(NamedTuple):
    """The mean of a paired difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassChange:
    """Accuracy of one class before and after, as fractions; `count` samples of it were seen."""

    label: int
    count: int
    before: float
    after: float


def flipped_answers(before: Tensor, after: Tensor) -> float:
    """Share of samples whose argmax changed; logits (..., classes), the leading dimensions are the samples."""
    _same_shape(before, after)
    if before.ndim < 2 or before[..., 0].numel() == 0:
        raise UserError(f"flipped answers need logits (samples, classes), not the shape {tuple(before.shape)}")
    return float((before.argmax(-1) != after.argmax(-1)).double().mean())


def changed_tokens(before: Tensor, after: Tensor, mask: Tensor | None = None) -> float:
    """Share of greedy tokens that changed; token ids of any equal shape, where `mask` (same shape) is true."""
    _same_shape(before, after)
    changed = (before != after) if mask is None else (before != after)[mask.bool()]
    if changed.numel() == 0:
        raise UserError("there is no token to compare")
    return float(changed.double().mean())


def class_changes(before: Tensor, after: Tensor, labels: Tensor) -> list[ClassChange]:
    """Accuracy of every class that occurs in `labels` (n,), from logits (n, classes); the worst change comes first."""
    _same_shape(before, after)
    right = [(logits.argmax(-1) == labels).double() for logits in (before, after)]
    changes = []
    for label in labels.unique().tolist():
        of_class = labels == label
        accuracies = [float(r[of_class].mean()) for r in right]
        changes.append(ClassChange(label, int(of_class.sum()), *accuracies))
    return sorted(changes, key=lambda c: c.after - c.before)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| averaged over equal-width bins; logits (n, classes).

    Guo et al., "On Calibration of Modern Neural Networks", 2017; computed by torchmetrics.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # seconds to import

    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise UserError(f"calibration needs logits (n, classes) of two classes or more, not {tuple(logits.shape)}")
    probabilities = logits.float().softmax(-1)
    error = multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=bins, norm="l1")
    return float(error)


def paired_difference(values_a: Tensor, values_b: Tensor, draws: int = 2000, seed: int = 0) -> Difference:
    """Mean of b - a over the same samples (n,), with the central 95 % of seeded bootstrap draws.

    Pairs cancel what the samples have in common, so this sees differences that two separate intervals hide.
    """
    _same_shape(values_a, values_b)
    if values_a.ndim != 1 or len(values_a) < 2:
        raise UserError(f"a paired difference needs two values or more in one dimension, not {tuple(values_a.shape)}")
    differences = values_b.double() - values_a.double()
    generator = torch.Generator().manual_seed(seed)
    n = len(differences)
    means = torch.stack([differences[torch.randint(n, (n,), generator=generator)].mean() for _ in range(draws)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(differences.mean()), low, high)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"before and after differ in shape: {tuple(a.shape)} and {tuple(b.shape)}; use the same samples"
        )
