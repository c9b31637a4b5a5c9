"""Finding the mixtures of experts in a model, watching what their routers choose, and changing it.

A router is a module that gives (logits (N, E), weights (N, k), chosen (N, k)): ours, and those of transformers'
Mixtral, OLMoE, Qwen-MoE and their like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.anatomy import Mixture, anatomy
from lilliput.errors import UserError
from lilliput.hooks import attached


class Routed(NamedTuple):
    """What a router gives for N tokens."""

    logits: Tensor  # (N, E)
    weights: Tensor  # (N, k)
    chosen: Tensor  # (N, k)


See = Callable[[int, Tensor, Routed], Routed | None]


def mixtures_of(model: nn.Module, method: str) -> list[Mixture]:
    """The mixtures of a model, from its first block to its last. Raises UserError when there is none."""
    found = [block.mixture for block in anatomy(model).blocks if block.mixture]
    if not found:
        raise UserError(
            f"{method} is for mixtures of experts, {type(model).__name__} has none that it knows; make one of a "
            "Llama-type model with experts.upcycle"
        )
    return found


def routers_of(model: nn.Module, method: str) -> list[Any]:
    """The routers of all mixtures, in their order."""
    return [model.get_submodule(part.router) for part in mixtures_of(model, method)]


def equal_routers_of(model: nn.Module, method: str) -> list[Any]:
    """The same. Raises UserError when the mixtures have different numbers of experts."""
    routers = routers_of(model, method)
    if len({router.num_experts for router in routers}) > 1:
        raise UserError(f"{method} is for mixtures with equal numbers of experts; those of this model differ")
    return routers


@contextmanager
def at_routers(routers: Sequence[nn.Module], see: See) -> Iterator[None]:
    """Calls `see(place, input, routed)` whenever one of them ran; what it returns replaces what that gave."""
    handles = []
    for index, router in enumerate(routers):

        def hook(module: nn.Module, args: tuple, output: Any, index: int = index) -> Routed | None:
            return see(index, args[0], _routed(module, output))

        handles.append(router.register_forward_hook(hook))
    with attached(handles):
        yield


def _routed(router: nn.Module, output: Any) -> Routed:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(t, Tensor) for t in output)):
        raise UserError(f"a {type(router).__name__} does not give logits, weights and chosen experts; it is not known")
    return Routed(*output)


def balance_loss(routed: Routed) -> Tensor:
    """E sum over experts of share of the choices times mean probability: 1 when all are used alike.

    Fedus, Zoph and Shazeer, Switch Transformers, 2021 (arXiv 2101.03961), equation 4.
    """
    experts = routed.logits.shape[-1]
    share = torch.bincount(routed.chosen.flatten(), minlength=experts) / routed.chosen.numel()
    return experts * (share * routed.logits.float().softmax(-1).mean(0)).sum()
