"""Magnitude: set the smallest weights of each layer to zero, at once or along the cubic schedule while training.

Paper: To prune, or not to prune (Zhu & Gupta, 2017, arXiv 1710.01878)

    s_t = s_f + (s_i - s_f) * (1 - t / n)^3

The zeros stay in dense weights: nothing runs faster, and a file shrinks only when something compresses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, is_conv1d
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, NONE, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.training import Callback, State, train
from lilliput.workload import Workload

RAMP = 0.75  # share of the steps during which sparsity still grows; the rest trains what is left
UPDATES = 20  # times the mask is chosen anew on the way


def cubic(step: float, steps: float, initial: float, final: float) -> float:
    """Sparsity after `step` of `steps`: `initial` at 0, `final` from `steps` on, fast at first."""
    if steps <= 0 or step >= steps:
        return final
    return final + (initial - final) * (1 - max(step, 0) / steps) ** 3


def mask(weight: Tensor, sparsity: float) -> Tensor:
    """Boolean tensor, False at the round(sparsity * n) smallest magnitudes, exactly that many."""
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity is {sparsity}; give a share from 0 to 1")
    count = round(sparsity * weight.numel())
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[weight.detach().abs().flatten().topk(count, largest=False).indices] = False
    return kept.view(weight.shape)


@dataclass(frozen=True)
class Magnitude(Method):
    """Zero the smallest weights of every layer; with training data and `steps`, train while sparsity grows."""

    sparsity: float = knob(0.5, low=0.0, high=0.99, per_layer=True, help="share of a layer's weights set to zero")
    steps: int = knob(0, low=0, high=1_000_000, help="training steps along the schedule; at once without training data")
    lr: float = knob(1e-4, low=1e-6, high=1e-1, log=True, help="learning rate of those steps")

    facts: ClassVar[Facts] = Facts(
        stage="prune",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=NONE,
        effect="size only, and only where the file is compressed",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Linear and convolution layers, without a head whose weight is also the embedding."""
        found = anatomy(model)
        for name, module in model.named_modules():
            weighted = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) or is_conv1d(module)
            if weighted and not (found.tied and name == found.head):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        goals = {name: settings.sparsity for name, settings in layers.items()}
        if workload is not None and workload.training is not None and self.steps:
            growing = Growing(goals, self.steps)
            train(model, list(workload.training), workload.loss, steps=self.steps, lr=self.lr, callbacks=[growing])
        for name, goal in goals.items():
            _zero_(model, name, mask(_weight(model, name), goal))
        return model


class Growing(Callback):
    """Raises sparsity along the cubic schedule, in `UPDATES` rises; what was zeroed stays zero."""

    def __init__(self, goals: Mapping[str, float], steps: int):
        self.goals, self.ramp = dict(goals), max(1, round(RAMP * steps))
        self.every = max(1, self.ramp // UPDATES)
        self.kept: dict[str, Tensor] = {}

    def on_step(self, state: State) -> None:
        for name, kept in self.kept.items():
            _zero_(state.model, name, kept)
        if state.step > self.ramp or (state.step % self.every and state.step != self.ramp):
            return
        for name, goal in self.goals.items():
            self.kept[name] = mask(_weight(state.model, name), cubic(state.step, self.ramp, 0.0, goal))
            _zero_(state.model, name, self.kept[name])

    def memory(self) -> dict[str, Any]:
        return dict(self.kept)

    def recall(self, memory: dict[str, Any]) -> None:
        self.kept = dict(memory)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight  # type: ignore[return-value]


@torch.no_grad()
def _zero_(model: nn.Module, name: str, kept: Tensor) -> None:
    _weight(model, name).masked_fill_(~kept, 0.0)
