"""Where two 1x1 layers stand one behind the other, read from a torch.fx trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TraceError

from lilliput.methods.factorize._factors import is_pointwise

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU)
_FUNCTIONS = {F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, torch.relu}


@dataclass(frozen=True)
class Pair:
    """Two pointwise layers and what lies between them: nothing (`exact`), or at most a norm and activations."""

    first: str
    second: str
    norm: str | None = None
    activation: bool = False
    core_after: bool = False  # the result feeds a larger convolution

    @property
    def exact(self) -> bool:
        return self.norm is None and not self.activation


def linear_pairs(model: nn.Module) -> list[Pair]:
    """Every pair of a traceable model, in the order of its forward; pairs that share a layer are all listed."""
    graph = _trace(model)
    if graph is None:
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = (_follow(node, modules, calls) for node in graph.nodes if _mergeable(node, modules, calls))
    return [pair for pair in found if pair is not None]


def _trace(model: nn.Module) -> fx.Graph | None:
    """The graph, or None: torch.fx refuses data-dependent code with errors of many kinds."""
    try:
        return fx.Tracer().trace(model)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return None


def _mergeable(node: fx.Node, modules: dict, calls: Counter) -> bool:
    if node.op != "call_module" or calls[node.target] > 1:
        return False
    layer = modules[node.target]
    if type(layer) is nn.Conv2d:
        return is_pointwise(layer) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")
    return type(layer) is nn.Linear


def _follow(start: fx.Node, modules: dict, calls: Counter) -> Pair | None:
    """Walk from a layer along single users to the next mergeable layer of the same kind."""
    norm, activation, node = None, False, start
    while len(node.users) == 1:
        node = next(iter(node.users))
        layer = modules.get(node.target) if node.op == "call_module" else None
        if _mergeable(node, modules, calls) and type(layer) is type(modules[start.target]):
            return Pair(str(start.target), str(node.target), norm, activation, _feeds_core(node, modules))
        if type(layer) is nn.BatchNorm2d and norm is None and not activation and calls[node.target] == 1:
            norm = str(node.target)
        elif isinstance(layer, ACTIVATIONS) or _is_activation_call(node):
            activation = True
        elif not isinstance(layer, nn.Identity):
            return None
    return None


def _is_activation_call(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target == "relu"
    )


def _feeds_core(node: fx.Node, modules: dict) -> bool:
    users = [modules.get(user.target) for user in node.users if user.op == "call_module"]
    return any(isinstance(layer, nn.Conv2d) and not is_pointwise(layer) for layer in users)
