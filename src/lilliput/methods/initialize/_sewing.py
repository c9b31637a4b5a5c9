"""A net that begins as one transformer and goes on as another: the first blocks of one, a linear layer, the last of the
other. It shares every module with both, so training it trains them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import Anatomy, in_out, needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import evaluating, watching
from lilliput.workload import Batch, Workload

DAMPING = 1e-4  # of the mean diagonal, so that directions without data do not make the system singular
SHARED = ("head_dim", "rope_parameters", "max_position_embeddings")  # positions are made once for all blocks


class Sewn(nn.Module):
    """A block behind the linear layer that carries the other net's states to it."""

    def __init__(self, stitch: nn.Module, block: nn.Module):
        super().__init__()
        self.stitch, self.block = stitch, block

    def forward(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        return self.block(self.stitch(hidden_states), *inputs, **named)


def check_family(small: nn.Module, large: nn.Module, method: str) -> tuple[Anatomy, Anatomy]:
    """The anatomies of two anchors. Raises UserError where one cannot go on with what the other began."""
    first, second = needs_blocks(small, method), needs_blocks(large, method)
    places = [(a.block_list, a.final_norm, a.head) for a in (first, second)]
    if type(small) is not type(large) or places[0] != places[1] or None in places[0]:
        names = f"{type(small).__name__} and {type(large).__name__}"
        raise UserError(f"{method} needs two models of one class, with norm and head behind the blocks, not {names}")
    outputs = [in_out(model.get_submodule(first.head or "")) for model in (small, large)]
    types = [next(model.parameters()).dtype for model in (small, large)]
    differing = [("outputs", *(size and size[1] for size in outputs)), ("types of weights", *types)]
    configs = [getattr(model, "config", None) for model in (small, large)]
    differing += [(name, *(getattr(config, name, None) for config in configs)) for name in SHARED]
    for name, ours, theirs in differing:
        if ours != theirs:
            raise UserError(f"{method}: {name} of the two models are {ours} and {theirs}; they must be equal")
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    if kinds:
        raise UserError(f"{method} needs blocks of full attention; some of these have {', '.join(sorted(kinds))}")
    return first, second


def sewn(small: nn.Module, large: nn.Module, found: Anatomy, at: tuple[int, int], stitch: nn.Module) -> nn.Module:
    """The first `at[0]` blocks of `small`, then those of `large` from `at[1]` on, with its norm and head.

    `found` is the anatomy of `small`; the names of `large` are the same.
    """
    ours, theirs = (list(model.get_submodule(found.block_list).children()) for model in (small, large))
    blocks = [*ours[: at[0]], Sewn(stitch, theirs[at[1]]), *theirs[at[1] + 1 :]]
    in_sequence = isinstance(small.get_submodule(found.block_list), nn.Sequential)
    parts: dict[str, nn.Module] = {found.block_list: nn.Sequential(*blocks) if in_sequence else nn.ModuleList(blocks)}
    parts |= {name: large.get_submodule(name) for name in (found.final_norm, found.head) if name}
    return shell(small, parts, len(blocks))


def shell(model: nn.Module, parts: Mapping[str, nn.Module], depth: int) -> nn.Module:
    """A model that shares everything with `model` but the named parts; its configs say that it has `depth` blocks."""
    owners = {"": _own(model, depth)}

    def owner(path: str) -> nn.Module:
        if path not in owners:
            way, _, leaf = path.rpartition(".")
            above = owner(way)
            owners[path] = above._modules[leaf] = _own(above.get_submodule(leaf), depth)
        return owners[path]

    for path, part in parts.items():
        way, _, leaf = path.rpartition(".")
        owner(way)._modules[leaf] = part
    return owners[""]


def _own(module: nn.Module, depth: int) -> nn.Module:
    """The module with a dictionary of children, and a config, of its own."""
    own: Any = copy.copy(module)
    own._modules = dict(module._modules)
    if "config" in vars(module):
        own.config = copy.copy(own.config)
        own.config.num_hidden_layers = depth
        own.config.tie_word_embeddings = False  # the head is the other net's
        if getattr(own.config, "layer_types", None):
            own.config.layer_types = ["full_attention"] * depth
    return own


@torch.no_grad()
def fitted_stitches(
    small: nn.Module, large: nn.Module, found: Anatomy, pairs: Sequence[tuple[int, int]], workload: Workload
) -> list[nn.Linear]:
    """For each pair the linear layer that carries what enters block i of `small` to what enters block j of `large`, by
    least squares over the calibration data."""
    grams: dict[tuple[int, int], list[Tensor]] = {}
    for batch in workload.calibration:
        ours = _states(small, workload, batch, [f"{found.block_list}.{i}" for i, _ in pairs])
        theirs = _states(large, workload, batch, [f"{found.block_list}.{j}" for _, j in pairs])
        for i, j in pairs:
            x, y = ours[f"{found.block_list}.{i}"], theirs[f"{found.block_list}.{j}"]
            x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1)
            sums = grams.setdefault((i, j), [torch.zeros(()), torch.zeros(())])
            sums[0], sums[1] = sums[0] + x.T @ x, sums[1] + x.T @ y
    dtype = next(large.parameters()).dtype
    return [_solved(*grams[pair]).to(dtype) for pair in pairs]


def _states(model: nn.Module, workload: Workload, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> (tokens, width) float64 inputs of the named blocks."""
    seen: dict[str, Tensor] = {}
    with evaluating(model), watching(model, names, lambda name, _, x: seen.update({name: x})):
        workload.forward(model, batch)
    return {name: x.flatten(0, -2).double() for name, x in seen.items()}


def _solved(gram: Tensor, cross: Tensor) -> nn.Linear:
    """The layer from moments of its inputs, the last of which is 1, and with its outputs."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + DAMPING * gram.diagonal().mean() * eye, cross).float()
    layer = nn.Linear(len(gram) - 1, solution.shape[1])
    layer.weight.copy_(solution[:-1].T)
    assert layer.bias is not None
    layer.bias.copy_(solution[-1])
    return layer
