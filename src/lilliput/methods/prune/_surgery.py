"""Cutting rows and columns out of linear layers, and looking at what reaches a layer on the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import is_conv1d
from lilliput.errors import UserError
from lilliput.hooks import evaluating, watching
from lilliput.workload import Workload


def plain(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether all are ordinary linear layers (or GPT-2's Conv1D, which `to_linear_` converts)."""
    modules = [model.get_submodule(name) for name in names]
    return all(type(m) is nn.Linear or is_conv1d(m) for m in modules)


def refuse_replaced(model: nn.Module, names: Iterable[str], method: str) -> None:
    """Raises UserError when one of the layers is no longer an ordinary linear layer; otherwise nothing."""
    for name in names:
        if not plain(model, [name]):
            layer = model.get_submodule(name)
            kind = "low-rank factors" if isinstance(layer, nn.Sequential) else f"a {type(layer).__name__}"
            raise UserError(
                f"{method} cuts rows and columns of ordinary linear layers, but {name!r} has become {kind}; "
                "prune first, then factorize and quantize"
            )


@torch.no_grad()
def keep_rows_(linear: nn.Module, kept: Tensor) -> None:
    """Keep only the outputs `kept` (indices) of an nn.Linear."""
    layer: Any = linear
    layer.weight = nn.Parameter(layer.weight[kept].contiguous(), layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept].contiguous(), layer.bias.requires_grad)
    layer.out_features = len(kept)


@torch.no_grad()
def keep_columns_(linear: nn.Module, kept: Tensor) -> None:
    """Keep only the inputs `kept` (indices) of an nn.Linear."""
    layer: Any = linear
    layer.weight = nn.Parameter(layer.weight[:, kept].contiguous(), layer.weight.requires_grad)
    layer.in_features = len(kept)


def select(scores: Tensor, keep: int) -> Tensor:
    """Ascending indices of the `keep` largest scores; among equals the first."""
    if not 1 <= keep <= len(scores):
        raise UserError(f"cannot keep {keep} of {len(scores)}; give a number from 1 to {len(scores)}")
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def average_inputs(
    model: nn.Module, workload: Workload, names: Iterable[str], statistic: Callable[[str, nn.Module, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Name -> `statistic(name, layer, input)` averaged over the calibration batches, weighted by their elements.

    Raises UserError, with the layer's name, when it is not finite or the layer never ran.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, int] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + statistic(name, layer, x.float()) * x.numel()
        weights[name] = weights.get(name, 0) + x.numel()

    names = list(names)
    with torch.no_grad(), evaluating(model), watching(model, names, see):
        for batch in workload.calibration:
            workload.forward(model, batch)
    for name in names:
        if name not in sums:
            raise UserError(f"layer {name!r} never ran on the calibration data; leave it out")
        if not torch.isfinite(sums[name]).all():
            raise UserError(f"the inputs of layer {name!r} are not finite on the calibration data; check the data")
    return {name: sums[name] / weights[name] for name in names}
