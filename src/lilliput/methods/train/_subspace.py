"""Layers of a subspace of networks: two sets of weights, the line between them, and how a point of it is compressed.

    W(a) = (1 - a) W_0 + a W_1,   of which the share s(a) = lowest + (1 - lowest) a is kept

`unstructured` zeroes the smallest weights of a layer; `structured` leaves the first channels of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.edits import build_module, module_config, set_module
from lilliput.errors import UserError
from lilliput.methods.prune.magnitude import mask

KINDS = ("Conv2d", "Linear", "GroupNorm", "BatchNorm2d", "LayerNorm")
NARROW = ("Conv2d", "Linear", "GroupNorm", "BatchNorm2d")  # which can have fewer channels
SIZES = {"Conv2d": "out_channels", "Linear": "out_features", "GroupNorm": "num_channels", "BatchNorm2d": "num_features"}


class SubspaceLayer(nn.Module):
    """A layer whose weights lie on a line (or, with one set of them, at a point) and are compressed as `alpha` says.

    `outputs` and `inputs` are channels that become fewer, 0 where none do; an input channel may be several columns.
    """

    start: Any
    end: Any

    def __init__(
        self,
        kind: str,
        config: dict[str, Any],
        line: bool = True,
        lowest: float = 0.25,
        unstructured: bool = True,
        outputs: int = 0,
        inputs: int = 0,
        alpha: float = 1.0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"a subspace has no layers of the kind {kind!r}; it has {', '.join(KINDS)}")
        self.kind, self.config, self.lowest = kind, dict(config), lowest
        self.unstructured, self.outputs, self.inputs, self.alpha = unstructured, outputs, inputs, alpha
        self.ease = 0.0  # share of the compression that is still left out, early in training
        self.start = build_module(kind, self.config)
        self.end = build_module(kind, self.config) if line else None
        if kind == "Linear":
            self.in_features, self.out_features = config["in_features"], config["out_features"]

    @classmethod
    def of(cls, layer: nn.Module, line: bool, **how: Any) -> Self:
        """A layer of the subspace with the weights of an ordinary one at both ends."""
        described = module_config(layer)
        assert described is not None
        made = cls(described["type"], described["config"], line, **how)
        for part in (made.start, made.end):
            if part is not None:
                part.load_state_dict(layer.state_dict())
                part.to(next(layer.parameters()).dtype)
        return made

    @property
    def line(self) -> bool:
        return self.end is not None

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        names = ("kind", "config", "line", "lowest", "unstructured", "outputs", "inputs", "alpha")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lowest={self.lowest}, outputs={self.outputs}, inputs={self.inputs}"

    @property
    def share(self) -> float:
        """What is kept at this alpha: of the weights, or of the channels."""
        least = self.lowest + (1 - self.lowest) * self.alpha
        return least + (1 - least) * self.ease

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Compressed weight and bias at this alpha."""
        weight, bias = (self._between(name) for name in ("weight", "bias"))
        assert weight is not None
        if self.unstructured and weight.ndim > 1:
            return weight * mask(weight, 1 - self.share), bias
        if self.outputs:
            kept = self.channels(self.outputs)
            weight, bias = weight[:kept], None if bias is None else bias[:kept]
        if self.inputs:
            weight = weight[:, : self.channels(self.inputs) * (weight.shape[1] // self.inputs)]
        return weight, bias

    def channels(self, of: int) -> int:
        """How many of so many channels are there at this alpha."""
        return max(1, round(self.share * of))

    def _between(self, name: str) -> Tensor | None:
        first = getattr(self.start, name)
        if first is None or not self.line:
            return first
        return torch.lerp(first, getattr(self.end, name), self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.tensors()
        layer: Any = self.start
        if self.kind == "Linear":
            return F.linear(x, weight, bias)
        if self.kind == "Conv2d":
            groups = self._groups(len(weight))
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)
        if self.kind == "GroupNorm":
            return F.group_norm(x, self._groups(len(weight)), weight, bias, layer.eps)
        if self.kind == "LayerNorm":
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, layer.eps)  # those of the batch fit every alpha

    def _groups(self, channels: int) -> int:
        """Of a convolution or a norm: one per channel stays one per channel."""
        groups = self.config["num_groups" if self.kind == "GroupNorm" else "groups"]
        return channels if groups == self.config[SIZES[self.kind]] else groups

    def plain(self) -> nn.Module:
        """An ordinary layer with the weights of this alpha."""
        weight, bias = self.tensors()
        config = self.config | self._sizes(weight)
        layer: Any = build_module(self.kind, config)
        layer.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def _sizes(self, weight: Tensor) -> dict[str, int]:
        if self.kind == "LayerNorm":
            return {}
        sizes = {SIZES[self.kind]: len(weight)}
        if self.kind == "Linear":
            sizes["in_features"] = weight.shape[1]
        elif self.kind == "Conv2d":
            sizes["groups"] = self._groups(len(weight))
            sizes["in_channels"] = weight.shape[1] * sizes["groups"]
        elif self.kind == "GroupNorm":
            sizes["num_groups"] = self._groups(len(weight))
        return sizes


def has_subspace(layer: nn.Module) -> bool:
    """Whether a layer is of KINDS and has weights, and pads with zeros that are given in pixels if it convolves."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    kinds = (nn.Linear, nn.GroupNorm, nn.BatchNorm2d, nn.LayerNorm)
    return type(layer) in kinds and getattr(layer, "weight", None) is not None


def subspace_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """The layers of the subspace by name. Raises UserError where there is none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, SubspaceLayer)]
    if not found:
        raise UserError(f"{type(model).__name__} is no subspace; make one with train.compressible_subspaces")
    yield from found


def set_alpha_(model: nn.Module, alpha: float, ease: float = 0.0) -> nn.Module:
    """Choose the point of a trained subspace: 0 is the most compressed, 1 is not compressed. Nothing is trained.

    Weights are interpolated and compressed in each pass from then on; `at` gives a model that need not.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; give a number from 0 (most compressed) to 1 (not compressed)")
    for _, layer in subspace_layers(model):
        layer.alpha, layer.ease = float(alpha), ease
    return model


@torch.no_grad()
def at(model: nn.Module, alpha: float) -> nn.Module:
    """A copy of the network at one point, of ordinary layers: with zeros in them, or with fewer channels.

    Batch norms of it begin with no statistics: run it over data in training mode before it is used.
    """
    model = set_alpha_(copy.deepcopy(model), alpha)
    for name, layer in list(subspace_layers(model)):
        set_module(model, name, layer.plain())
    return model


def closeness(model: nn.Module) -> Tensor:
    """The squared cosine between the two ends, all weight matrices together; 0 where there is one end."""
    pairs = [(m.start.weight, m.end.weight) for _, m in subspace_layers(model) if m.line and m.start.weight.ndim > 1]
    if not pairs:
        return torch.zeros(())
    product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    squares = [torch.stack([part.square().sum() for part in side]).sum() for side in zip(*pairs)]
    return product.square() / math.prod(squares)  # pyright: ignore
