"""Folds batch norms into the convolutions before them, and finds the convolutions that end in a residual sum.

Who feeds whom is read off one run of the model, by the identity of the tensors: no tracing, any Python code.

    BN(W x + b) = W' x + b',   W' = W g / sqrt(v + eps),   b' = (b - m) g / sqrt(v + eps) + beta
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lilliput.edits import set_module
from lilliput.hooks import evaluating, tensors_in
from lilliput.workload import Workload

SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


class _Uses(TorchFunctionMode):
    """Notes which calls take the output of each convolution or batch norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.owners: dict[int, str] = {}  # id of a weight or running mean -> name of its module
        self.takers: dict[str, set[str]] = defaultdict(set)  # module -> modules and functions that take its output
        self.sources: dict[str, set[str]] = defaultdict(set)  # module -> modules whose output it takes, "" for others
        self._made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept so that its id stays taken
        for name, module in model.named_modules():
            key = module.weight if isinstance(module, nn.Conv2d) else getattr(module, "running_mean", None)
            if isinstance(key, Tensor):
                self.owners[id(key)] = name if id(key) not in self.owners else ""  # "": shared, left alone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor | tuple | list):
            return out
        inputs = list(tensors_in([*args, *(kwargs or {}).values()]))
        owner = next((self.owners[id(t)] for t in inputs if id(t) in self.owners), None)
        makers = [self._made[id(t)][0] for t in inputs if id(t) in self._made]
        for maker in makers:
            self.takers[maker].add(owner or _label(func, inputs))
        if owner and isinstance(out, Tensor):
            self.sources[owner].update(makers or [""])
            self._made[id(out)] = (owner, out)
        return out


def _label(func: Any, inputs: list[Tensor]) -> str:
    """ "+" for the sum of two tensors of one shape, else the function's name in a form no module name has."""
    name = getattr(func, "__name__", "call")
    return "+" if name in SUMS and len(inputs) == 2 and inputs[0].shape == inputs[1].shape else f"{name}()"


def fold_batch_norms_(model: nn.Module, workload: Workload, names: Collection[str]) -> set[str]:
    """Fold in place what follows the named convolutions; returns those of them whose output goes only into sums."""
    with evaluating(model), torch.no_grad(), _Uses(model) as uses:
        workload.forward(model, workload.example)
    into_sums = set()
    for name in names:
        layer, last = model.get_submodule(name), name
        if not isinstance(layer, nn.Conv2d):
            continue
        takers = uses.takers.get(name, set())
        norm = next(iter(takers)) if len(takers) == 1 else ""
        if uses.sources[norm] == {name} and fold_(layer, model.get_submodule(norm)):
            set_module(model, norm, nn.Identity())
            last = norm
        if uses.takers.get(last) == {"+"}:
            into_sums.add(name)
    return into_sums


def fold_(conv: nn.Conv2d, norm: nn.Module) -> bool:
    """Move a BatchNorm2d into the convolution before it; False when it has no statistics of its own."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    with torch.no_grad():
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight
        bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        bias = bias * gain if norm.bias is None else bias * gain + norm.bias
        conv.weight.copy_(conv.weight * gain.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
    return True
