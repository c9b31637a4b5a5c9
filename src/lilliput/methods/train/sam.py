"""Sharpness-aware minimisation: step by the gradient of the worst point nearby.   w - lr g(w + rho g(w) / |g(w)|)

    optimizer = Sam(rho=0.05).wrap(torch.optim.SGD(model.parameters(), 0.1), model)

    def closure():                                       # a plain loop: torch's own convention, two passes a step
        optimizer.zero_grad(); loss = loss_fn(model, batch); loss.backward(); return loss
    optimizer.step(closure)

    class Sharp(Trainer):                   # transformers: Sharp(model, args, optimizers=(optimizer, None))
        def training_step(self, *inputs):
            loss = super().training_step(*inputs)
            with optimizer.perturbed():
                super().training_step(*inputs)
            return loss

Paper: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020 (arXiv 2010.01412), one
of the parts of the small-data recipe of arXiv 2309.03965. Batch norms keep the statistics of the first pass. With
gradient accumulation the Trainer's way does not work: a second micro-batch would climb along the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.train._displaced import WrappedOptimizer, gradient_norm


@dataclass(frozen=True)
class Sam(Settings):
    """Minimise the highest loss within a distance `rho` of the weights; a step costs two passes."""

    rho: float = knob(0.05, low=0.0, high=100.0, help="how far from the weights the second gradient is taken")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="steps by worst points, two passes a step")
    paper: ClassVar[str] = "resnet9_small_data"

    def wrap(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> SamOptimizer:
        """The optimizer with this in front of it; `model` keeps the statistics of its batch norms in second passes."""
        return SamOptimizer(self, optimizer, model)


class SamOptimizer(WrappedOptimizer):
    """An optimizer whose gradients are those of `w + rho g / |g|`."""

    def __init__(self, settings: Sam, base: torch.optim.Optimizer, model: nn.Module | None = None):
        super().__init__(base, model)
        self.settings = settings

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a closure that zeroes the gradients, computes the loss, calls backward and returns the loss: both passes
        and the step, and the loss at w. Without: the other optimizer's step by the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                with self.perturbed():
                    closure()
        self.base.step()
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """After a first `backward()`: inside, the weights are the worst point nearby and have no gradient yet.

        The gradient that is computed inside stays. Raises UserError when there is no first one or it is not finite.
        """
        parameters = [p for p, _ in self.with_gradients()]
        factor = self.settings.rho / (gradient_norm(parameters) + 1e-12)
        with self.displaced([(p, factor) for p in parameters]):
            for p in parameters:
                p.grad = None
            yield
