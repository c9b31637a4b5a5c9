"""Cross-layer equalisation: move scale from one layer to the next so that their channels have equal ranges.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
    s_c = sqrt(r1_c / r2_c):  W1[c] /= s_c,  W2[:, c] *= s_c   leaves W2 relu(W1 x) as it was
Two layers form a pair only when nothing else reads what lies between them: never across a branch point.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lilliput.edits import set_module
from lilliput.methods.quantize._statistics import Stats, called_once, trace

Layer = nn.Conv2d | nn.Linear
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PASSING = (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, *POOLS)
FUNCTIONS = (F.relu, torch.relu, F.max_pool2d, F.adaptive_avg_pool2d, torch.flatten, torch.mean)
METHODS = ("relu", "flatten", "mean", "contiguous")


class ChannelReLU6(nn.Module):
    """min(relu(x), cap) with one cap per channel: what ReLU6 becomes when the channels before it are rescaled.

    The source replaces ReLU6 by ReLU, which changes the function; a cap of 6 / s_c keeps it exactly.
    """

    cap: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("cap", torch.full((channels,), 6.0))

    def rebuild_config(self) -> dict[str, int]:
        """Arguments of the constructor."""
        return {"channels": self.channels}

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.cap.view(-1, *[1] * (x.dim() - 2)).to(x.dtype))


@dataclass(frozen=True)
class Pair:
    """Two layers by name with only channel-wise, positively homogeneous steps between them."""

    first: str
    second: str
    rectified: bool  # a ReLU or ReLU6 lies between
    capped: str = ""  # the ReLU6 between them


def find_pairs(model: nn.Module) -> list[Pair]:
    """Every pair of layers that can be equalised, in the order of the graph."""
    graph = trace(model)
    once = called_once(graph)
    found = (_follow(model, node, once) for node in graph.graph.nodes if _is_layer(model, node, once))
    return [pair for pair in found if pair is not None]


def _is_layer(model: nn.Module, node: fx.Node, once: set[str]) -> bool:
    return node.op == "call_module" and node.target in once and _plain(model.get_submodule(str(node.target)))


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d or type(module) is nn.Linear


def _follow(model: nn.Module, start: fx.Node, once: set[str]) -> Pair | None:
    """The layer that alone reads what this one makes, if only harmless steps lie between."""
    node, rectified, capped = start, False, ""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _is_layer(model, node, once):
            return Pair(str(start.target), str(node.target), rectified, capped)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU6 | ChannelReLU6) and node.target in once and not capped:
            rectified, capped = True, str(node.target)
        elif not _passes(node, module):
            return None
        rectified = rectified or isinstance(module, nn.ReLU) or "relu" in _name(node)
    return None


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        padded = isinstance(module, nn.AvgPool2d) and module.padding not in (0, (0, 0))
        return isinstance(module, PASSING) and not padded  # a padded mean is not homogeneous at the border
    known = (
        node.target in FUNCTIONS if node.op == "call_function" else node.op == "call_method" and node.target in METHODS
    )
    return known and (_name(node) != "mean" or _mean_over_space(node))


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _mean_over_space(node: fx.Node) -> bool:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(dims, tuple | list) and sorted(operator.mod(d, 4) for d in dims) == [2, 3]  # type: ignore[arg-type]


# --- the arithmetic --------------------------------------------------------------------------------------------


def output_ranges(layer: Layer) -> Tensor:
    """Largest |weight| of each output channel, (C,)."""
    return layer.weight.detach().flatten(1).abs().amax(1)


def by_input(layer: Layer, channels: int) -> Tensor:
    """A view of the weight as (groups, outputs of a group, inputs of a group, rest); dimensions 0 and 2 are channels.

    A Linear behind a flattened map has `rest` inputs for each channel.
    """
    groups = getattr(layer, "groups", 1)
    return layer.weight.detach().view(groups, layer.weight.shape[0] // groups, channels // groups, -1)


@torch.no_grad()
def equalize_(model: nn.Module, stats: Stats, sweeps: int = 40) -> list[Pair]:
    """Equalise every pair until the scales settle; `stats` moves along. The network's function stays as it was."""
    pairs = find_pairs(model)
    for pair in pairs:
        if pair.capped and not isinstance(model.get_submodule(pair.capped), ChannelReLU6):
            channels = len(model.get_submodule(pair.first).weight)  # type: ignore[arg-type]
            set_module(model, pair.capped, ChannelReLU6(channels))
    for _ in range(sweeps):
        change = max((_equalize_pair_(model, pair, stats) for pair in pairs), default=0.0)
        if change < 1e-3:
            break
    return pairs


def _equalize_pair_(model: nn.Module, pair: Pair, stats: Stats) -> float:
    """Returns the largest |log s|."""
    first, second = _layers(model, pair)
    before, view = output_ranges(first), by_input(second, len(first.weight))
    after = view.abs().amax((1, 3)).flatten()
    alive = (before > 0) & (after > 0)
    s = torch.where(alive, (before / after.clamp_min(1e-30)).sqrt(), 1.0).clamp(1e-4, 1e4)
    first.weight.div_(s.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    view.mul_(s.view(view.shape[0], 1, view.shape[2], 1))
    if pair.first in stats:
        mean, std = stats[pair.first]
        stats[pair.first] = (mean / s, std / s)
    if pair.capped:
        model.get_submodule(pair.capped).cap.div_(s)  # type: ignore[operator, union-attr]
    return float(s.log().abs().max())


@torch.no_grad()
def absorb_bias_(model: nn.Module, pairs: list[Pair], stats: Stats, sigmas: float = 3.0) -> None:
    """Move the part of a bias that all but never meets the rectifier's bend into the next layer.

    c = max(0, mean - 3 std) leaves the first layer's bias and W2 c enters the second's. Only where the second layer
    pads nothing, since a border of zeros would not shift with the rest (the source ignores that).
    """
    for pair in pairs:
        first, second = _layers(model, pair)
        padded = isinstance(second, nn.Conv2d) and (isinstance(second.padding, str) or any(second.padding))
        if not pair.rectified or padded or pair.first not in stats or first.bias is None:
            continue
        mean, std = stats[pair.first]
        c = (mean - sigmas * std).clamp_min(0)
        first.bias.sub_(c)
        view = by_input(second, len(c))
        shift = (view * c.view(view.shape[0], 1, view.shape[2], 1)).sum((2, 3)).flatten()
        second.bias = nn.Parameter(shift if second.bias is None else second.bias + shift)
        stats[pair.first] = (mean - c, std)
        if pair.capped:
            model.get_submodule(pair.capped).cap.sub_(c)  # type: ignore[operator, union-attr]


def _layers(model: nn.Module, pair: Pair) -> tuple[Layer, Layer]:
    return model.get_submodule(pair.first), model.get_submodule(pair.second)  # type: ignore[return-value]
