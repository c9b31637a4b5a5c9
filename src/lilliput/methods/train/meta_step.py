"""A step on one half of a batch that must also help the other.   g = g_A(w) + g_B(w - a g_A(w))

Two halves of a batch are two tasks: the gradient of the second is taken where a step on the first would lead. Both
are passes over half a batch, so a step costs about what an ordinary one does.

    optimizer = MetaStep().wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    first, second = halves(batch)
    loss_fn(model, first).backward()
    with optimizer.ahead():
        loss_fn(model, second).backward()
    optimizer.step()

In transformers' Trainer the two passes stand in `training_step`, as with `train.sam`, on `halves(inputs)`.

Paper: part of the small-data recipe of arXiv 2309.03965, which names meta-learning-based training; that it is of first
order (no gradient through the inner step) is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.train._displaced import WrappedOptimizer


@dataclass(frozen=True)
class MetaStep(Settings):
    """Update by a gradient and by that of other samples after a step along it."""

    inner: float = knob(1.0, low=0.0, high=1000.0, help="length of the step ahead, in learning rates")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="steps that help other samples too")
    paper: ClassVar[str] = "resnet9_small_data"

    def wrap(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> MetaOptimizer:
        """The optimizer with `ahead()`; `model` keeps the statistics of its batch norms inside of it."""
        return MetaOptimizer(self, optimizer, model)


class MetaOptimizer(WrappedOptimizer):
    """An optimizer that can stand for a while where its gradient leads."""

    def __init__(self, settings: MetaStep, base: torch.optim.Optimizer, model: nn.Module | None = None):
        super().__init__(base, model)
        self.settings = settings

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """After a first `backward()`: inside, the weights are those after a plain step along its gradient.

        Gradients that are computed inside are added to the first. Raises UserError when there is no first one.
        """
        with self.displaced([(p, -self.settings.inner * lr) for p, lr in self.with_gradients()]):
            yield


def halves(batch: Any) -> tuple[Any, Any]:
    """A batch of tensors (B, ...), in a dictionary, tuple or list, as two of B // 2 and of the rest.

    Raises UserError for fewer than two samples.
    """
    if isinstance(batch, Mapping):
        parts = {key: halves(value) for key, value in batch.items()}
        return {k: v[0] for k, v in parts.items()}, {k: v[1] for k, v in parts.items()}
    if isinstance(batch, list | tuple):
        pairs = [halves(value) for value in batch]
        return type(batch)(a for a, _ in pairs), type(batch)(b for _, b in pairs)
    if not isinstance(batch, Tensor) or batch.ndim == 0 or len(batch) < 2:
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise UserError(f"a part of the batch is {shape}; a step ahead needs tensors of at least 2 samples")
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]
