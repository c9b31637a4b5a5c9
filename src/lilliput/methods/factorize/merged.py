"""Neighbouring 1x1 layers as one: what a Tucker decomposition adds to a bottleneck, folded into what stands beside it.

Paper: Accelerating the Low-Rank Decomposed Models, arXiv 2407.20266 (layer merging).
Formula: b(a(x)) = (B A) x + B a0 + b0. With a batch norm and an activation between the two this is not so: they move
to the side of the core, the norm starts as the identity on calibration data, and the network needs fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import evaluating, watching
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.factorize._chains import Pair, linear_pairs
from lilliput.methods.factorize._factors import Layer, factored_layers
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class Merged(Method):
    """Multiply neighbouring 1x1 convolutions (or linear layers) into one wherever that does not add weights.

    norms="keep" merges only what nothing separates, which is exact. norms="move" also merges across a batch norm and an
    activation (the bottleneck after Tucker), which changes the function: fine-tune afterwards. The side the norm goes
    to is (reconstructed): next to the core, so that no convolution is left without a non-linearity.
    """

    norms: str = knob("keep", choices=("keep", "move"), help="merge across batch norm and activation (then fine-tune)")

    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="fewer layers: faster; exact with norms='keep'",
    )
    paper: ClassVar[str] = "accelerated_lrd"

    def targets(self, model: nn.Module) -> Iterator[str]:
        for pair in self.pairs(model, tucker_outer(model)):
            yield pair.first

    def pairs(self, model: nn.Module, outer: set[str]) -> list[Pair]:
        """The pairs this setting merges; across a norm only where one of the two is an `outer` factor of a Tucker core.

        A model that torch.fx cannot trace has none.
        """
        move = self.norms == "move"
        pairs = [p for p in linear_pairs(model) if p.exact or (move and outer & {p.first, p.second})]
        return [p for p in pairs if weights_added(model, p) <= 0]

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Merged]) -> nn.Module:
        if any(settings.norms == "move" for settings in layers.values()):
            workload = need_workload(workload, "factorize.merged", "to set the moved norms (or set norms='keep')")
        outer = tucker_outer(model)
        while todo := [p for p in self.pairs(model, outer) if p.first in layers]:
            merge_pair_(model, todo[0], workload)
        return model


def tucker_outer(model: nn.Module) -> set[str]:
    """Names of the 1x1 factors around every Tucker core."""
    return {f"{name}.{i}" for name, factors in factored_layers(model).items() if len(factors) == 3 for i in (0, 2)}


def weights_added(model: nn.Module, pair: Pair) -> int:
    """Weights of the merged layer minus those of both."""
    a, b = _layer(model, pair.first), _layer(model, pair.second)
    return b.weight.shape[0] * a.weight.shape[1] - a.weight.numel() - b.weight.numel()


def merge_pair_(model: nn.Module, pair: Pair, workload: Workload | None = None) -> None:
    """Merge one pair in place; `Identity` stands where the other layer was, so the model's code stays valid."""
    a, b = _layer(model, pair.first), _layer(model, pair.second)
    norm = model.get_submodule(pair.norm) if pair.norm else None
    merged = multiply(a, b, norm)
    early = pair.core_after or pair.exact
    set_module(model, pair.first, merged if early else nn.Identity())
    set_module(model, pair.second, nn.Identity() if early else merged)
    if pair.norm:
        old = model.get_submodule(pair.norm)
        assert isinstance(old, nn.BatchNorm2d)
        assert workload is not None
        width = merged.weight.shape[0] if early else merged.weight.shape[1]
        set_module(model, pair.norm, nn.BatchNorm2d(width, old.eps, old.momentum).to(a.weight.dtype))
        start_as_identity_(model, pair.norm, workload)


@torch.no_grad()
def multiply(a: Layer, b: Layer, norm: nn.Module | None = None) -> Layer:
    """The one layer x -> b(norm(a(x))), with the norm's running statistics (as in evaluation)."""
    with_bias = a.bias is not None or b.bias is not None or norm is not None
    merged = _new(a, b, with_bias).to(a.weight.dtype).train(a.training)
    first, second = a.weight.flatten(1).double(), b.weight.flatten(1).double()
    scale = torch.ones(len(first), dtype=torch.double)
    shift = torch.zeros(len(first), dtype=torch.double) if a.bias is None else a.bias.double()
    if norm is not None:
        scale, shift = _affine(norm, shift)
    bias = second @ shift + (0 if b.bias is None else b.bias.double())
    merged.weight.copy_((second @ (scale.unsqueeze(1) * first)).view_as(merged.weight))
    if merged.bias is not None:
        merged.bias.copy_(bias)
    return merged


def _new(a: Layer, b: Layer, bias: bool) -> Layer:
    if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
        return nn.Linear(a.in_features, b.out_features, bias)
    if isinstance(a, nn.Conv2d) and isinstance(b, nn.Conv2d):
        stride = (a.stride[0] * b.stride[0], a.stride[1] * b.stride[1])
        return nn.Conv2d(a.in_channels, b.out_channels, 1, stride, bias=bias)
    raise UserError(f"a {type(a).__name__} and a {type(b).__name__} cannot be merged; pass two of one kind")


def _affine(norm: nn.Module, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm after `+ shift`, in evaluation, as scale and shift."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None or norm.running_mean is None:
        raise UserError(f"{type(norm).__name__} without running statistics cannot be folded; use norms='keep'")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    moved = (shift - norm.running_mean.double()) * scale
    if norm.weight is not None:
        scale, moved = scale * norm.weight.double(), moved * norm.weight.double() + norm.bias.double()
    return scale, moved


@torch.no_grad()
def start_as_identity_(model: nn.Module, name: str, workload: Workload) -> None:
    """Set a BatchNorm2d so that it does nothing yet in evaluation, with the statistics of the calibration data."""
    norm = model.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    seen: list[torch.Tensor] = []  # per batch: (3, C) of count, sum, sum of squares

    def see(_: str, layer: nn.Module, x: torch.Tensor) -> None:
        x = x.double()
        count = torch.full((x.shape[1],), x.numel() / x.shape[1], dtype=torch.double)
        seen.append(torch.stack([count, x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]))

    with evaluating(model), watching(model, [name], see):
        for batch in workload.calibration:
            workload.forward(model, batch)
    count, total, squares = torch.stack(seen).sum(0)
    mean = total / count
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((squares / count - mean.square()).clamp_min(0))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer
