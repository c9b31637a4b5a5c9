"""Feed-forward parts made of ordinary linear layers, most around a (shifted) ReLU, and why others are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Mlp, in_out, needs_blocks, to_linear_
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.methods.layers._rectified import activation_name, rectifier_shift
from lilliput.methods.prune._surgery import plain, refuse_replaced

PROBES = 4  # random inputs on which a part must compute what it is taken for
TOLERANCE = 1e-3  # relative


class Rectified(NamedTuple):
    """A part down(max(0, gate(x) - shift) * up(x)), without up in plain ones; layers by the names they have in it."""

    name: str
    layers: dict[str, Any]  # gate, up (if any), down, each an nn.Linear
    shift: float


def rectified_names(model: nn.Module, method: str) -> Iterator[str]:
    """Names of the parts that can be replaced. Raises UserError that says why none can be."""
    mlps = [block.mlp for block in needs_blocks(model, method).blocks if block.mlp]
    reasons = {mlp.name: _obstacle(model, mlp) for mlp in mlps}
    if all(reasons.values()):
        refuse_replaced(model, [n for m in mlps for n in (*m.into, m.down)], method)
        why = next(iter(reasons.values()), "there is no feed-forward part")
        raise UserError(f"{method} finds no feed-forward part it can replace in {type(model).__name__}: {why}")
    yield from (name for name, why in reasons.items() if not why)


def rectified_parts(model: nn.Module, names: Iterable[str], method: str) -> Iterator[Rectified]:
    """The named parts, one after another. Raises UserError for one that computes something else from its layers."""
    to_linear_(model)
    mlps = {b.mlp.name: b.mlp for b in needs_blocks(model, method).blocks if b.mlp}
    for name in names:
        layers: dict[str, Any] = {
            n.removeprefix(f"{name}."): model.get_submodule(n) for n in (*mlps[name].into, mlps[name].down)
        }
        shift = _shift(model, mlps[name])
        assert shift is not None
        check_same(name, model.get_submodule(name), list(layers.values()), partial(_rectified, shift=shift))
        yield Rectified(name, layers, shift)


def _rectified(x: Tensor, shift: float) -> Tensor:
    return F.relu(x - shift)


def _shift(model: nn.Module, mlp: Mlp) -> float | None:
    activation = activation_name(model, mlp)
    return rectifier_shift(model.get_submodule(activation) if activation else None)


def _obstacle(model: nn.Module, mlp: Mlp) -> str:
    """Why a feed-forward part cannot be replaced, '' when it can."""
    if (why := structural_obstacle(model, mlp)) or _shift(model, mlp) is not None:
        return why
    name = activation_name(model, mlp)
    kind = type(model.get_submodule(name)).__name__ if name else "no module of its own"
    return f"its activation is {kind}, which is never exactly zero; apply layers.relufy and train before"


def structural_obstacle(model: nn.Module, mlp: Mlp) -> str:
    """Why a feed-forward part is not one module of separate ordinary linear layers, '' when it is."""
    layers = (*mlp.into, mlp.down)
    if not all(layer.rpartition(".")[0] == mlp.name for layer in layers) or mlp.name.count(".") < 1:
        return f"the layers of {mlp.name!r} do not stand in one module"
    if not plain(model, layers) or (mlp.gated and len(mlp.into) == 1):
        return f"{mlp.name!r} is not made of separate ordinary linear layers"
    if any("attention" in type(m).__name__.lower() for m in model.get_submodule(mlp.name).modules()):
        return f"the layers of {mlp.name!r} stand beside an attention, not in a module of their own"
    inputs, outputs = in_out(model.get_submodule(mlp.into[0])), in_out(model.get_submodule(mlp.down))
    if not inputs or not outputs or inputs[0] != outputs[1]:
        return f"{mlp.name!r} gives another width than it takes"
    return ""


@torch.no_grad()
def check_same(
    name: str, part: nn.Module, linears: Sequence[nn.Linear], activation: Callable[[Tensor], Tensor]
) -> None:
    """Raises UserError when a module computes something else from its layers than down(activation(gate) * up)."""
    gate, *up, down = linears
    x = torch.randn(1, PROBES, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight.dtype)
    hidden = activation(gate(x))
    for layer in up:
        hidden = hidden * layer(x)
    with evaluating(part):
        found, expected = part(x), down(hidden)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise UserError(f"{name!r} gives something else than one tensor of its input's shape; leave it out")
    if float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()) + 1e-6:
        raise UserError(f"{name!r} computes something else than down(activation(gate) * up); leave it out")
