"""What reaches the last linear layer of every expert, and how the logits depend on what it gives.

A plain feed-forward part counts as one expert that all tokens use. Inputs a are those of the layer times the weight of
the router, gradients g those at the sum of the experts: what the layer's weight adds to the logits' Jacobian is g a'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import in_out, needs_blocks
from lilliput.errors import UserError
from lilliput.methods.experts._mixture import FusedExpert
from lilliput.methods.experts.specmd import shell_of


class Site(NamedTuple):
    """A feed-forward part: the module that gives its output, its experts, and the weight (d, k) of each one's last
    layer."""

    name: str
    weights: list[Tensor]
    mixture: bool


class Tokens(NamedTuple):
    """Of one expert in one batch: the samples (n,) its tokens belong to, inputs a (n, k), gradients g (C, n, d)."""

    site: int
    expert: int
    samples: Tensor
    inputs: Tensor
    gradients: Tensor


def sites_of(model: nn.Module, method: str, blocks: int) -> list[Site]:
    """The feed-forward parts of the last `blocks` blocks (0: of all). Raises UserError when there is none."""
    found = []
    for block in needs_blocks(model, method).blocks[-blocks:]:
        if block.mixture:
            module = model.get_submodule(block.mixture.experts)
            found.append(Site(block.mixture.experts, list(last_weights(module)), True))
        elif block.mlp and in_out(model.get_submodule(block.mlp.down)):
            layer = model.get_submodule(block.mlp.down)
            if type(layer) is not nn.Linear:
                raise UserError(f"{method} needs float weights; {block.mlp.down!r} is a {type(layer).__name__}")
            found.append(Site(block.mlp.down, [layer.weight], False))
    if not found:
        raise UserError(f"{method} finds no feed-forward part and no experts in {type(model).__name__}")
    return found


def last_weights(experts: Any) -> Iterator[Tensor]:
    """The weight (d, k) of every expert's last layer. Raises UserError for experts of an unknown kind."""
    if isinstance(shell_of(experts), FusedExpert):
        yield from experts.down_proj
    else:
        yield from (expert.down_proj.weight for expert in experts)


def neurons(experts: Any, number: int, x: Tensor) -> Tensor:
    """What an expert's last layer reads for x (n, d)."""
    if isinstance(experts, nn.ModuleList):
        expert: Any = experts[number]
        return expert.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
    gate, up = F.linear(x, experts.gate_up_proj[number]).chunk(2, -1)
    return experts.act_fn(gate) * up


class _Caught(NamedTuple):
    args: tuple[Tensor, ...]
    output: Tensor


@contextmanager
def _catching(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, _Caught]]:
    """What each site is called with and gives, in the graph."""
    caught: dict[str, _Caught] = {}
    handles = []
    for site in sites:

        def hook(module: nn.Module, args: tuple, output: Tensor, name: str = site.name) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            caught[name] = _Caught(tuple(a.detach() for a in args), output)
            return output.clone()  # what follows may write into it

        handles.append(model.get_submodule(site.name).register_forward_hook(hook))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def seen_tokens(model: nn.Module, sites: Sequence[Site], call: Callable[[], Tensor]) -> tuple[Tensor, list[Tokens]]:
    """Logits (B, C) of a call of the model, and the tokens of every expert on which they depend."""
    with torch.inference_mode(False), torch.enable_grad():
        with _catching(model, sites) as caught:
            logits = call()
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UserError(
                f"the model gives logits of the shape {tuple(logits.shape)}; give (B, classes), of a language model "
                "those of the answers: AnswerTokens(model, tokens)"
            )
        gradients = _gradients(logits, [caught[site.name].output for site in sites])
    found: list[Tokens] = []
    with torch.no_grad():
        for place, (site, g) in enumerate(zip(sites, gradients)):
            found += _of_site(model, place, site, caught[site.name], g, len(logits))
    return logits.detach(), found


def _gradients(logits: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Per output (..., d) the gradients of all logits, (C, tokens, d)."""
    rows = [torch.autograd.grad(logits[:, c].sum(), outputs, retain_graph=True) for c in range(logits.shape[1])]
    return [torch.stack([g.flatten(0, -2) for g in column]) for column in zip(*rows)]


def _of_site(model: nn.Module, place: int, site: Site, caught: _Caught, g: Tensor, samples: int) -> Iterator[Tokens]:
    """The tokens of each expert of a site, without those that no logit depends on."""
    per_sample = g.shape[1] // samples
    live = (g != 0).any(-1).any(0)
    if not site.mixture:
        rows = live.nonzero().flatten()
        yield Tokens(place, 0, rows // per_sample, caught.args[0].flatten(0, -2)[rows], g[:, rows])
        return
    hidden, chosen, weights = (t.flatten(0, -2) for t in caught.args[:3])
    experts = model.get_submodule(site.name)
    for number in chosen[live].unique().tolist():
        rows, slots = ((chosen == number) & live[:, None]).nonzero(as_tuple=True)
        a = neurons(experts, number, hidden[rows]) * weights[rows, slots, None]
        yield Tokens(place, number, rows // per_sample, a, g[:, rows])
