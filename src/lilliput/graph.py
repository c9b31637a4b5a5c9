"""Which channels must be cut together: Torch-Pruning's dependency graph behind a narrow face.

A residual sum ties the outputs of two layers, a depthwise convolution its input to its output, a flatten one channel to
many columns. `coupled_channels` lists these groups, `remove_channels_` cuts channels out of whole groups and proves on
the example that cutting gave the same output as zeroing.

The graph is that of DepGraph: Towards Any Structural Pruning (Fang et al., CVPR 2023, arXiv 2301.12900).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, linear_parts
from lilliput.edits import module_config
from lilliput.errors import UserError

Forward = Callable[[nn.Module, Any], Any]

MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm)  # their output changes for all channels when one goes
TOLERANCE = 1e-3  # of the largest output, between cutting and zeroing in float32


@dataclass(frozen=True)
class Member:
    """One side of one layer: its index `indices[i]` belongs to the group's channel `channels[i]`."""

    module: str
    side: str  # 'out' (rows, or the one width of a norm or depthwise layer) or 'in' (columns)
    indices: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels of several layers that live and die together; `name` is the first layer that makes them."""

    name: str
    members: tuple[Member, ...]
    channels: int
    prunable: bool

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """(module, 'out' | 'in') of every member."""
        return tuple((m.module, m.side) for m in self.members)

    def producers(self) -> list[str]:
        """Names of the layers whose outputs are cut."""
        return [m.module for m in self.members if m.side == "out"]


def coupled_channels(model: nn.Module, example: Any, forward: Forward | None = None) -> list[Group]:
    """The groups of coupled channels, in model order.

    `example` is a tensor or a batch (its `label` is ignored); `forward(model, example)` says how to run it otherwise.
    A group is not prunable when it reaches the model's output, the heads of an attention, a grouped convolution, a
    tied weight, or a parameter or layer that cannot be resized and saved.
    """
    with _traceable(model):
        graph, roots = _trace(model, example, forward)
        return _groups(model, graph, roots)


def remove_channels_(
    model: nn.Module, example: Any, remove: Mapping[str, Iterable[int]], forward: Forward | None = None
) -> nn.Module:
    """Cut the channels `remove` names, group by group, in place.

    `remove` maps a layer (any that makes the channels of a group) to indices of its outputs. Raises UserError for
    indices out of range, a group that is not prunable, one group named twice, a group that would be emptied, and a
    model whose output after the cut differs from the output with the same channels zeroed (the graph misread it).
    """
    wanted = {name: sorted({int(i) for i in indices}) for name, indices in remove.items()}
    wanted = {name: indices for name, indices in wanted.items() if indices}
    if not wanted:
        return model
    with _traceable(model):
        graph, roots = _trace(model, example, forward)
        groups = _groups(model, graph, roots)
        chosen = _choose(groups, wanted)
        reference = _zeroed_output(model, chosen, example, forward)
        for name, indices in wanted.items():
            layer = model.get_submodule(name)
            graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, indices).prune()
        _verify(model, list(wanted), example, forward, reference)
    return model


def kept_count(total: int, ratio: float, round_to: int = 1) -> int:
    """How many of `total` channels stay when `ratio` goes: the nearest multiple of `round_to`, at least one multiple.

    Ratio 0 keeps everything, even when `total` is no multiple; nothing ever grows.
    """
    if not 0 <= ratio <= 1 or round_to < 1:
        raise UserError(
            f"ratio is {ratio} and round_to {round_to}; give a ratio from 0 to 1 and round_to of at least 1"
        )
    if ratio == 0:
        return total
    multiples = max(1, int(total * (1 - ratio) / round_to + 0.5))
    return min(total, multiples * round_to)


# --- tracing ---------------------------------------------------------------------------------------------------


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients for all, as tracing needs; both are as before afterwards."""
    training = {name: m.training for name, m in model.named_modules()}
    wants_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wants_grad[name])


def _run(model: nn.Module, example: Any, forward: Forward | None) -> Any:
    if forward is not None:
        out = forward(model, example)
    elif isinstance(example, dict):
        inputs = {k: v for k, v in example.items() if k != "label"}
        out = model(inputs["input"]) if set(inputs) == {"input"} else model(**inputs)
    else:
        out = model(example)
    return getattr(out, "logits", out)


def _trace(model: nn.Module, example: Any, forward: Forward | None) -> tuple[Any, set[Any]]:
    """(dependency graph, the backward functions of the model's outputs)."""
    import torch_pruning

    outputs: list[Any] = []

    def run(traced: nn.Module, batch: Any) -> Any:
        outputs.append(_run(traced, batch, forward))
        return outputs[-1]

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(model, example, forward_fn=run, verbose=False)
    return graph, {o.grad_fn for o in _tensors(outputs)}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in values for tensor in _tensors(item)]


def _groups(model: nn.Module, graph: Any, roots: set[Any]) -> list[Group]:
    names = {module: name for name, module in model.named_modules()}
    fixed = _fixed(model, graph, roots)
    seen: set[str] = set()
    groups = []
    for name, module in model.named_modules():
        if name in seen or module not in graph.module2node or not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        pruner = graph.get_pruner_of_module(module)
        items = graph.get_pruning_group(module, pruner.prune_out_channels, range(pruner.get_out_channels(module)))
        groups.append(_group(name, items, graph, names, fixed))
        seen.update(groups[-1].producers())
    return groups


def _group(name: str, items: Any, graph: Any, names: dict[nn.Module, str], fixed: set[Any]) -> Group:
    members, resizable = [], True
    for item in items:
        target = item.dep.target.module
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        resizable &= (target, side) not in fixed
        if target in names:
            members.append(Member(names[target], side, tuple(item.idxs), tuple(item.root_idxs)))
            resizable &= _resizable(target, side, item.idxs)
        resizable &= not isinstance(target, nn.Parameter)
    channels = len(items[0].idxs)
    consumed = any(m.side == "in" for m in members)
    return Group(name, tuple(members), channels, resizable and consumed)


def _resizable(module: nn.Module, side: str, indices: Iterable[int]) -> bool:
    """Whether the layer can be cut here and saved afterwards."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    config = module_config(module)
    if config is None or hasattr(type(module), "rebuild_config"):
        return False
    depthwise = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels
    if getattr(module, "groups", 1) > 1 and not depthwise:
        return False
    width = _width(module, side)
    return width is None or max(indices) < width


def _width(module: nn.Module, side: str) -> int | None:
    names = ("out_channels", "out_features", "num_features") if side == "out" else ("in_channels", "in_features")
    return next((getattr(module, n) for n in names if hasattr(module, n)), None)


def _fixed(model: nn.Module, graph: Any, roots: set[Any]) -> set[Any]:
    """(module, side) pairs whose width must stay: outputs of the model, attention heads, tied weights."""
    fixed = {
        (node.module, side) for node in graph.module2node.values() if node.grad_fn in roots for side in ("out", "in")
    }
    fixed = {(m, s) for m, s in fixed if s == "out" or not isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    for block in anatomy(model).blocks:
        if block.attention:
            a = block.attention
            fixed |= {(linear_parts(model.get_submodule(n))[-1], "out") for n in (a.q, a.k, a.v)}
            fixed.add((linear_parts(model.get_submodule(a.o))[0], "in"))
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return fixed | {(m, s) for tied in owners.values() if len(tied) > 1 for m in tied for s in ("out", "in")}


# --- removing --------------------------------------------------------------------------------------------------


def _choose(groups: list[Group], wanted: dict[str, list[int]]) -> list[tuple[Group, str, set[int]]]:
    """(group, named layer, indices to remove) of each wish, checked."""
    chosen: list[tuple[Group, str, set[int]]] = []
    for name, indices in wanted.items():
        group = next((g for g in groups if name in g.producers()), None)
        if group is None:
            raise UserError(f"{name!r} makes no channels the graph knows; the groups are {[g.name for g in groups]}")
        if not group.prunable:
            raise UserError(f"the channels of {name!r} cannot be cut: they reach {_last(group)} or the model's output")
        if any(group is other for other, _, _ in chosen):
            raise UserError(f"{name!r} is coupled with another layer named here; name one of {group.producers()}")
        member = next(m for m in group.members if m.module == name and m.side == "out")
        if indices[0] < 0 or indices[-1] >= len(member.indices):
            raise UserError(f"{name!r} has {len(member.indices)} channels; {indices[0]}..{indices[-1]} is out of range")
        if len(indices) == len(member.indices):
            raise UserError(f"all {len(indices)} channels of {name!r} would go; keep at least one")
        chosen.append((group, name, set(indices)))
    return chosen


def _last(group: Group) -> str:
    return group.members[-1].module


@torch.no_grad()
def _zeroed_output(
    model: nn.Module, chosen: list[tuple[Group, str, set[int]]], example: Any, forward: Forward | None
) -> list[Tensor] | None:
    """Outputs with the columns that read the doomed channels set to zero; None when a norm mixes the channels."""
    masked = copy.deepcopy(model)
    for group, name, doomed in chosen:
        if any(isinstance(model.get_submodule(m.module), MIXING_NORMS) for m in group.members):
            return None
        named = next(m for m in group.members if m.module == name and m.side == "out")
        channels = {c for i, c in zip(named.indices, named.channels) if i in doomed}
        for member in (m for m in group.members if m.side == "in"):
            columns = [i for i, c in zip(member.indices, member.channels) if c in channels]
            masked.get_submodule(member.module).weight[:, columns] = 0  # pyright: ignore
    return _tensors(_run(masked, example, forward))


@torch.no_grad()
def _verify(
    model: nn.Module, names: list[str], example: Any, forward: Forward | None, reference: list[Tensor] | None
) -> None:
    try:
        outputs = _tensors(_run(model, example, forward))
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"cutting channels of {names} broke the model ({error}); leave them out") from None
    for ours, theirs in zip(outputs, reference or []):
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE * (theirs.abs().max() + 1e-6):
            raise UserError(f"cutting channels of {names} is not what zeroing them gives: the graph misread the model")
