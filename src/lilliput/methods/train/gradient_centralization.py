"""Gradients without their mean: of each output's weights the mean of the gradient is taken off before a step.

    g <- g - mean of g over all dimensions but the first

    GradientCentralization().attach(optimizer)                       # any torch optimizer, any loop
    GradientCentralization().attach(trainer.create_optimizer())      # transformers, before trainer.train()

Paper: Yong et al., Gradient Centralization: A New Optimization Technique for Deep Neural Networks, 2020 (arXiv
2004.01461), one of the parts of the small-data recipe of arXiv 2309.03965. Weights with one input per output are left
alone, for theirs would vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lilliput.method import LABELLED, Facts, Settings, knob

DIMENSIONS = {"all": 2, "convolutions": 3}  # fewest of a weight that is centralized


@dataclass(frozen=True)
class GradientCentralization(Settings):
    """Take the mean off the gradients of all weights with more than one dimension, before each step."""

    layers: str = knob("all", choices=tuple(DIMENSIONS), help="which weights: all matrices, or only of convolutions")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="gradients without their mean")
    paper: ClassVar[str] = "resnet9_small_data"

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """From now on, before every step of the optimizer; `.remove()` of what is returned ends it.

        The hook is no part of `optimizer.state_dict()`: attach it again to one that is restored.
        """

        def centralize(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.ndim >= DIMENSIONS[self.layers]:
                        centralize_(p.grad)

        return optimizer.register_step_pre_hook(centralize)


@torch.no_grad()
def centralize_(gradient: Tensor) -> Tensor:
    """(outputs, ...) with mean 0 for each output; one with a single weight per output, or a sparse one, stays."""
    if gradient.is_sparse or gradient.numel() == len(gradient):
        return gradient
    return gradient.sub_(gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True))
