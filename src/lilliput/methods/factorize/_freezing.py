"""Training a factored network with some of the factors held still: cheaper steps at the same size.

Paper: sequential freezing, arXiv 2309.03824; only the core, arXiv 2407.20266. Both count on factors that start from the
trained weights. A frozen factor gets no gradient tensor, so neither momentum nor weight decay moves it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lilliput.errors import UserError
from lilliput.methods.factorize._factors import factored_layers
from lilliput.training import Callback, State

Names = list[str]


def alternate(model: nn.Module) -> list[Names]:
    """Parameter names frozen in even and in odd periods: all but the first factor of each layer, then the first."""
    layers = factored_layers(model)
    rest = [f"{name}.{i}.weight" for name, factors in layers.items() for i in range(1, len(factors))]
    return [rest, [f"{name}.0.weight" for name in layers]]


def outer(model: nn.Module) -> list[Names]:
    """Parameter names frozen throughout: the 1x1 factors around a core; of a pair the first one (reconstructed)."""
    layers = factored_layers(model).items()
    return [[f"{name}.{i}.weight" for name, factors in layers for i in range(0, len(factors), 2)]]


class SequentialFreezing(Callback):
    """For `training.train`: in each period another list of `which(model)` is frozen, in turn.

    A period is an epoch, or `period` steps. At the end of the run everything trains again as before it.
    """

    def __init__(self, which=alternate, period: str | int = "epoch"):
        if period != "epoch" and not (isinstance(period, int) and period > 0):
            raise UserError(f"period is {period!r}; give 'epoch' or a positive number of steps")
        self.which, self.period = which, period
        self.trainable: Names | None = None  # before the run; a resumed run has some of them frozen

    def on_start(self, state: State) -> None:
        self.groups = self.which(state.model)
        if not any(self.groups):
            name = type(state.model).__name__
            raise UserError(
                f"{name} has no factored layer to freeze; apply factorize.tucker or factorize.low_rank first"
            )
        if self.trainable is None:
            self.trainable = [name for name, p in state.model.named_parameters() if p.requires_grad]
        self._freeze(state)

    def on_step(self, state: State) -> None:
        if self.period != "epoch":
            self._freeze(state)

    def on_epoch(self, state: State) -> None:
        if self.period == "epoch":
            self._freeze(state)

    def on_end(self, state: State) -> None:
        self._freeze(state, ())

    def memory(self) -> dict[str, Any]:
        return {"trainable": self.trainable}

    def recall(self, memory: dict[str, Any]) -> None:
        self.trainable = memory["trainable"]

    def _freeze(self, state: State, names: tuple[str, ...] | None = None) -> None:
        if names is None:
            turn = state.epoch if self.period == "epoch" else state.step // int(self.period)
            names = tuple(self.groups[turn % len(self.groups)])
        still, trainable = set(names), set(self.trainable or ())
        for name, parameter in state.model.named_parameters():
            parameter.requires_grad_(name in trainable and name not in still)
            if not parameter.requires_grad:
                parameter.grad = None
