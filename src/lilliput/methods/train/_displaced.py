"""Gradients taken beside the weights: an optimizer around another one, and weights that are moved for one more pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lilliput.errors import UserError


class WrappedOptimizer(torch.optim.Optimizer):
    """Another optimizer under torch's own interface, for loops, schedulers and trainers; all state is the other's.

    `model`, if given, keeps the statistics of its batch norms while its weights are displaced.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module | None = None):
        self.base, self.model = base, model

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.base.step(closure)  # type: ignore[arg-type]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.base.register_step_post_hook(hook)

    def with_gradients(self) -> list[tuple[Tensor, float]]:
        """Every parameter that has a gradient, with the learning rate of its group. Raises UserError for none."""
        found = [(p, float(g["lr"])) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not found:
            raise UserError(f"{type(self).__name__} finds no gradient; call backward() on a first loss before")
        return found

    @contextmanager
    def displaced(self, along: Sequence[tuple[Tensor, float]]) -> Iterator[None]:
        """Inside, each parameter p is p + factor * p.grad; afterwards it is what it was, to the bit."""
        kept = [p.detach().clone() for p, _ in along]
        with torch.no_grad():
            for p, factor in along:
                p.add_(p.grad, alpha=factor)  # type: ignore[arg-type]
        try:
            with still_statistics(self.model):
                yield
        finally:
            with torch.no_grad():
                for (p, _), before in zip(along, kept):
                    p.copy_(before)


@contextmanager
def still_statistics(model: nn.Module | None) -> Iterator[None]:
    """Whatever runs inside leaves no trace in the running statistics of a model's batch norms."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase)] if model is not None else []
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Length of the whole gradient. Raises UserError when it is not finite."""
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not math.isfinite(norm):
        raise UserError(f"the norm of the gradient is {norm}; lower the learning rate, or look at the data")
    return norm
