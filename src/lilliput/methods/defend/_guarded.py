"""A model with a guard around it, and what guards ask of models and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, linear_parts
from lilliput.errors import UserError
from lilliput.method import Guard
from lilliput.workload import Batch, Workload

FEWEST = 40  # harmless examples from which a threshold can be set


class Seen(NamedTuple):
    """What a guarded model answers (B, classes), how much it doubts each input (B,), and which it flags: above 1."""

    logits: Tensor
    score: Tensor
    flagged: Tensor


class GuardedModel(nn.Module):
    """A model that stays as it is, and what watches over its inputs; called as the model is, it gives logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # whoever sets the mode of this sets that of the model

    def inspect(self, input: Tensor) -> Seen:
        """Answers and doubts; input (B, ...)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return self.inspect(input).logits


@dataclass(frozen=True)
class Detector(Guard):
    """A guard that says what it doubts."""

    def wrap(self, model: nn.Module, workload: Workload) -> GuardedModel:
        """A module around `model`, which stays as it is. Raises UserError for a model or data that it does not fit."""
        raise NotImplementedError


def answered(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, classes) of a model that gives them, or has them in what it gives."""
    out = model(x)
    return getattr(out, "logits", out)


def linear_head(model: nn.Module, guard: str) -> str:
    """The name of the last linear layer, packed or factored too. Raises UserError for a model without one."""
    name = anatomy(model).head
    if name is None or not linear_parts(model.get_submodule(name)):
        raise UserError(f"{guard} looks at the input of a linear head, which {type(model).__name__} has not")
    return name


def pictures_of(workload: Workload, guard: str) -> Tensor:
    """The calibration inputs (N, C, H, W). Raises UserError for others and for fewer than FEWEST."""
    if workload.kind == "causal_lm" or workload.calibration[0].get("input") is None:
        raise UserError(f"{guard} guards classifiers of pictures, and {workload.name!r} has no `input`")
    x = gathered(workload.calibration, "input")
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(f"{guard} guards classifiers of float pictures (B, C, H, W), not {tuple(x.shape)} {x.dtype}")
    if len(x) < FEWEST:
        raise UserError(f"{guard} needs {FEWEST} or more calibration examples that are harmless, {len(x)} were given")
    return x


def gathered(batches: Iterable[Batch], key: str) -> Tensor:
    """One tensor of all batches' values under a key."""
    found = [batch[key] for batch in batches if key in batch]
    return torch.cat(found) if found else torch.zeros(0)


@contextmanager
def changing_input(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer `name` reads `change(its input)` for a while."""

    def hook(layer: nn.Module, args: tuple) -> tuple:
        return (change(args[0]), *args[1:])

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def one_sided_limit(values: Tensor, false_alarms: float) -> Tensor:
    """The bound that at most a share `false_alarms` of values (N,) of any distribution exceeds, by Cantelli's
    inequality: mean + deviation sqrt(1 / share - 1)."""
    return values.mean() + values.std() * (1 / false_alarms - 1) ** 0.5
