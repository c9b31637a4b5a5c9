"""What a change did to the answers beyond the average score: flips, calibration, tokens, pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lilliput.errors import UserError


class Difference(NamedTuple):
    """The mean of a paired difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Reliability(NamedTuple):
    """Samples by confidence in equal-width bins: how many, how sure and how often right the model was; (bins,) each."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


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


def confidence_gaps(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, whether it was right, and the bin of each sample (n,), from logits (n, classes)."""
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise UserError(f"calibration needs logits (n, classes) of two classes or more, not {tuple(logits.shape)}")
    confidence, answers = logits.double().softmax(-1).max(-1)
    places = (confidence * bins).long().clamp(max=bins - 1)
    return confidence, (answers == labels).double(), places


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """The data of a reliability diagram; empty bins hold zeros."""
    confidence, right, places = confidence_gaps(logits, labels, bins)
    counts = torch.bincount(places, minlength=bins)
    sums = (torch.bincount(places, v, minlength=bins) / counts.clamp_min(1) for v in (confidence, right))
    return Reliability(counts, *sums)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| averaged over equal-width bins; logits (n, classes).

    Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    counts, confidence, accuracy = reliability(logits, labels, bins)
    return float(((confidence - accuracy).abs() * counts).sum() / counts.sum())


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
