"""Adversarial examples by the Adversarial Robustness Toolbox, for a classifier in torch and inputs in 0 .. 1.

Papers: Explaining and Harnessing Adversarial Examples (Goodfellow et al., 2014, arXiv 1412.6572); Towards Deep Learning
Models Resistant to Adversarial Attacks (Madry et al., 2017, arXiv 1706.06083); DeepFool (Moosavi-Dezfooli et al., 2015,
arXiv 1511.04599); Towards Evaluating the Robustness of Neural Networks (Carlini & Wagner, 2016, arXiv 1608.04644)
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.errors import UserError, missing_extra
from lilliput.workload import Workload

ATTACKS = ("fgsm", "pgd", "deepfool", "cw")
BOUNDED = ("fgsm", "pgd")  # by the largest change of a value; the others by the Euclidean length of the change
OVERSHOOT = 0.02  # of DeepFool
SEARCHES, FIRST_WEIGHT, RATE = 4, 1.0, 0.05  # of Carlini and Wagner's: weights of the margin tried, first one, step
INTEGERS = (torch.int8, torch.uint8, torch.int16)


def without_toolbox() -> UserError | None:
    """The error that names the extra when the toolbox is not installed."""
    package = "adversarial-robustness-toolbox"  # another package is imported as `art` too
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing_extra(package, "attacks")
    return None


class UnitInput(nn.Module):
    """A copy of a model that takes inputs in 0 .. 1, in evaluation mode, whose weights need no gradient.

    Layers with integer weights pass gradients on as those of the weights that their codes stand for, and those that
    round activations pass them straight through: the forward pass is the model's own.
    """

    def __init__(self, workload: Workload, model: nn.Module, low: Tensor, high: Tensor):
        super().__init__()
        self.inside = copy.deepcopy(model).eval().requires_grad_(False)
        self.workload, self.low, self.span = workload, low, (high - low).clamp_min(1e-12)

    def forward(self, unit: Tensor) -> Tensor:
        return self.workload.forward(self.inside, {"input": self.whole(unit)})

    def unit(self, x: Tensor) -> Tensor:
        """Inputs of the model -> 0 .. 1."""
        return ((x - self.low) / self.span).clamp(0, 1)

    def whole(self, unit: Tensor) -> Tensor:
        """0 .. 1 -> inputs of the model."""
        return unit * self.span + self.low

    def needs_gradient(self, unit: Tensor) -> None:
        """Raise UserError when no gradient reaches the input."""
        with torch.enable_grad():
            answer = self(unit[:1].clone().requires_grad_(True))
        if not answer.requires_grad:
            raise UserError(
                f"no gradient reaches the input of {type(self.inside).__name__}, so nothing can be attacked through "
                "it; attack the model before its layers were replaced"
            )


def integer_layers(model: nn.Module) -> int:
    """Layers that hold weights or tables as integers of 8 or 16 bits."""
    return sum(any(b.dtype in INTEGERS for b in m.buffers(recurse=False)) for m in model.modules())


def crafted(model: UnitInput, x: Tensor, labels: Tensor, attack: str, eps: float, steps: int) -> Tensor:
    """Inputs (B, ...) in 0 .. 1 -> the same, changed so that the model no longer answers the labels (B,).

    A value changes by at most `eps` in the bounded attacks; in the others the change has at most the length of a change
    by `eps` everywhere, and a longer one is shortened to it. The same call gives the same examples.
    """
    with _seeded_numpy(), torch.enable_grad():
        made = _attack(model, x, labels, attack, eps, steps).generate(x.numpy(), labels.numpy())
    return within(x, torch.from_numpy(made), eps, attack)


def within(x: Tensor, made: Tensor, eps: float, attack: str) -> Tensor:
    """Examples no further from x than the attack may go, in 0 .. 1; what is not a number stays as x was."""
    change = torch.where(torch.isfinite(made), made - x, 0.0)
    if attack in BOUNDED:
        return (x + change.clamp(-eps, eps)).clamp(0, 1)
    length = change.flatten(1).norm(dim=1).clamp_min(1e-12)
    share = (eps * change[0].numel() ** 0.5 / length).clamp_max(1)
    return (x + change * share.view(-1, *[1] * (x.ndim - 1))).clamp(0, 1)


def _attack(model: UnitInput, x: Tensor, labels: Tensor, attack: str, eps: float, steps: int) -> Any:
    if error := without_toolbox():
        raise error
    from art.attacks import evasion

    with torch.no_grad():
        classes = model(x[:1]).shape[-1]
    estimator = _classifier()(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    size = {"batch_size": len(x)}
    if attack == "fgsm":
        return evasion.FastGradientMethod(estimator, norm=np.inf, eps=eps, **size)
    if attack == "pgd":
        step = 2.5 * eps / steps  # so that any point of the ball can be reached from any other
        return evasion.ProjectedGradientDescent(
            estimator, norm=np.inf, eps=eps, eps_step=step, max_iter=steps, num_random_init=1, verbose=False, **size
        )
    if attack == "deepfool":
        return evasion.DeepFool(estimator, max_iter=steps, epsilon=OVERSHOOT, verbose=False, **size)
    return evasion.CarliniL2Method(
        estimator, max_iter=steps, binary_search_steps=SEARCHES, initial_const=FIRST_WEIGHT, learning_rate=RATE,
        verbose=False, **size,
    )  # fmt: skip


@cache
def _classifier() -> type:
    """The toolbox's classifier, with one pass back where each sample asks for the gradient of its own class."""
    from art.estimators.classification import PyTorchClassifier

    class Classifier(PyTorchClassifier):
        def class_gradient(self, x, label=None, training_mode=False, **options):
            if not isinstance(label, np.ndarray):
                return super().class_gradient(x, label=label, training_mode=training_mode, **options)
            inputs = torch.from_numpy(np.asarray(x, np.float32)).requires_grad_(True)
            own = self.model(inputs).gather(1, torch.from_numpy(label).long().view(-1, 1))
            return torch.autograd.grad(own.sum(), inputs)[0].numpy()[:, None]

    return Classifier


@contextmanager
def _seeded_numpy() -> Iterator[None]:
    """numpy's global random numbers, from which the toolbox draws, from a fixed seed; as they were afterwards."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)
