"""Where the hidden neurons of a net are: whose rows make them, whose columns read them, and what lies between.

A plain chain of layers is found by running it and proved by exchanging its neurons: the answers must stay the same. Of
a transformer these are the neurons of the feed-forward parts; everything else reads and writes the residual stream.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, is_conv1d
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.methods.prune._surgery import plain, refuse_replaced
from lilliput.workload import Workload

MAKERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Hidden:
    """One layer of hidden neurons by the full names of modules."""

    into: tuple[str, ...]  # their rows make the neurons
    norms: tuple[str, ...]  # hold a number for each neuron
    out: str  # its columns read them, several for each neuron behind a flatten

    def neurons(self, tensors: Mapping[str, Tensor]) -> int:
        return len(tensors[f"{self.into[0]}.weight"])


def hidden_layers(model: nn.Module, workload: Workload) -> list[Hidden]:
    """All layers of hidden neurons, in their order. Raises UserError where they cannot be told apart."""
    blocks = anatomy(model).blocks
    found = _feed_forward(model, blocks) if blocks else _chain(model, workload)
    if not found:
        raise UserError(f"{type(model).__name__} has no hidden neurons between two layers; there is nothing to align")
    _prove(model, workload, found)
    return found


def _feed_forward(model: nn.Module, blocks: Sequence[Any]) -> list[Hidden]:
    if any(is_conv1d(module) for module in model.modules()):
        raise UserError(f"{type(model).__name__} stores its layers as Conv1D; call anatomy.to_linear_ on it first")
    mlps = [block.mlp for block in blocks if block.mlp and not (block.mlp.gated and len(block.mlp.into) == 1)]
    refuse_replaced(model, [name for mlp in mlps for name in (*mlp.into, mlp.down)], "initialize.ot_fusion")
    return [Hidden(mlp.into, (), mlp.down) for mlp in mlps]


def _chain(model: nn.Module, workload: Workload) -> list[Hidden]:
    """Hidden neurons between consecutive layers of those that run, one after another."""
    order = _running(model, workload)
    makers = [i for i, name in enumerate(order) if isinstance(model.get_submodule(name), MAKERS)]
    for i in makers:
        layer: Any = model.get_submodule(order[i])
        if not (plain(model, [order[i]]) or getattr(layer, "groups", 0) == 1):
            raise UserError(f"layer {order[i]!r} is no plain linear layer and no convolution of one group")
    for a, b in itertools.pairwise(makers):
        if _columns(model, order[b]) % _rows(model, order[a]):
            raise _no_chain(model, f"{order[b]!r} does not read what {order[a]!r} gives")
    return [Hidden((order[a],), tuple(order[a + 1 : b]), order[b]) for a, b in itertools.pairwise(makers)]


def _running(model: nn.Module, workload: Workload) -> list[str]:
    """Names of the modules that own tensors, in the order in which they run on the example, each once."""
    order: list[str] = []
    owners = [n for n, m in model.named_modules() if {**m._parameters, **m._buffers}]
    if "" in owners:
        raise _no_chain(model, "it owns tensors itself, outside its layers")
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: order.append(name))
        for name in owners
    ]
    with attached(handles), torch.no_grad(), evaluating(model):
        workload.forward(model, workload.example)
    if twice := next((name for name in order if order.count(name) > 1), None):
        raise _no_chain(model, f"{twice!r} runs twice")
    return order


def _rows(model: nn.Module, name: str) -> int:
    return len(model.get_submodule(name).weight)  # pyright: ignore


def _columns(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).weight.shape[1]  # pyright: ignore


def _no_chain(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"{type(model).__name__} is neither a plain chain of layers nor a transformer: {why}. Neurons of residual and "
        "branched nets are tied to each other; fuse a plain chain, or average nets that were trained from one start"
    )


@torch.no_grad()
def _prove(model: nn.Module, workload: Workload, found: Sequence[Hidden]) -> None:
    """Exchange all hidden neurons at random; the net must answer as before."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for hidden in found:
        order = torch.eye(hidden.neurons(tensors))[torch.randperm(hidden.neurons(tensors), generator=generator)]
        carry_(tensors, hidden, order, order.T)
    other = copy.deepcopy(model)
    other.load_state_dict(tensors)
    with evaluating(model), evaluating(other):
        before, after = (workload.forward(m, workload.example).float() for m in (model, other))
    if not bool((after - before).abs().max() <= 1e-3 * before.abs().max()):
        raise _no_chain(model, "exchanging its neurons changes what it answers")


def carry_(tensors: Tensors, hidden: Hidden, ahead: Tensor, back: Tensor) -> None:
    """Put other neurons into the place of these: new ones are sums of the old, ahead (new, old), and where the old were
    read now stand sums of the new, back (old, new)."""
    count = hidden.neurons(tensors)
    for name in hidden.into:
        for leaf in (f"{name}.weight", f"{name}.bias"):
            if leaf in tensors:
                tensors[leaf] = _mixed(ahead, tensors[leaf])
    for name in (t for norm in hidden.norms for t in tensors if t.rpartition(".")[0] == norm):
        if tensors[name].shape == (count,):
            tensors[name] = _mixed(ahead, tensors[name])
    weight = tensors[f"{hidden.out}.weight"]
    split = weight.double().reshape(len(weight), count, -1)
    read = torch.einsum("onp,nm->omp", split, back.double()).reshape(len(weight), -1, *weight.shape[2:])
    tensors[f"{hidden.out}.weight"] = read.to(weight.dtype)


def _mixed(ahead: Tensor, rows: Tensor) -> Tensor:
    """(new, old) times (old, ...) -> (new, ...)."""
    return torch.tensordot(ahead.double(), rows.double(), 1).to(rows.dtype)
