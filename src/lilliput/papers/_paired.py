"""Comparing models on the same windows of text or the same seeds: differences with their standard error."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.workload import CausalLM, Workload, windows


def drawn_test(workload: Workload, count: int, seed: int) -> Workload:
    """The same workload with `count` windows of its test data, drawn without replacement."""
    ids = torch.cat([batch["input_ids"] for batch in workload.test])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    drawn = copy.copy(workload)
    drawn.test = windows(ids[order[:count].sort().values], batch_size=8)
    assert isinstance(drawn, CausalLM)
    return drawn


def advantage(ours: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean of other - ours over windows (positive: ours is better), and its standard error."""
    gain = (other - ours).double()
    return float(gain.mean()), float(gain.std() / len(gain) ** 0.5)


def advantage_by_seed(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of ours - other, a value of each for every seed (positive: ours has more), and its standard error; infinite
    for a single seed."""
    gains = [a - b for a, b in zip(ours, other, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    return statistics.fmean(gains), error


def mean_and_spread(per_seed: Sequence[Tensor]) -> tuple[float, float]:
    """Of values (samples,) for every seed the mean, and the deviation of the means over seeds; that of a single seed is
    its standard error over samples."""
    means = torch.stack([values.double().mean() for values in per_seed])
    single = per_seed[0].double().std() / len(per_seed[0]) ** 0.5
    return float(means.mean()), float(means.std() if len(means) > 1 else single)


class Scored(Protocol):
    """What was measured of a contender."""

    @property
    def accuracies(self) -> Sequence[float]:
        """Percent right, for every seed."""
        ...


def points_over(of: Scored, over: Scored) -> tuple[float, float]:
    """Points of accuracy `of` has more than `over`: mean over seeds and the standard error of that mean."""
    return advantage_by_seed(of.accuracies, over.accuracies)


def last_losses(logits: Tensor, windows: Tensor, count: int) -> Tensor:
    """(n, count): loss of the last tokens of windows (n, T), in nats; logits (n, more than count, V) end with them."""
    targets = windows[:, -count:].unsqueeze(-1)
    return -logits[:, -count - 1 : -1].float().log_softmax(-1).gather(-1, targets).squeeze(-1)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers of any packed kind, by name."""
    for name, layer in model.named_modules():
        if hasattr(layer, "dequantized") and hasattr(layer, "in_features"):
            yield name, layer


@torch.no_grad()
def as_float_(model: nn.Module) -> nn.Module:
    """Packed linear layers as plain ones of the weights they stand for: only the weights differ then."""
    for name, layer in list(packed_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.copy_(layer.dequantized())
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
        set_module(model, name, linear)
    return model


def bits_per_weight(model: nn.Module) -> float:
    """All bytes of the packed linear layers, scales and tables counted, over their weights."""
    packed = [layer for _, layer in packed_layers(model)]
    return 8 * sum(m.weight_bytes for m in packed) / sum(m.in_features * m.out_features for m in packed)
