"""Looking into a model while it runs: evaluation mode for a while, and what reaches its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module back in its own mode afterwards; gradients stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def renewing_norms(model: nn.Module) -> Iterator[list[Any]]:
    """Within the block all batch norms, which it yields, average the means and variances of what they see anew; the
    rest of the model is in evaluation mode, and all of it afterwards."""
    model.eval()
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        with torch.no_grad():
            yield norms
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.eval()


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Convolution weights with the channels innermost, which torch's kernels like; the order they had afterwards."""
    weights = [p for p in model.parameters() if p.ndim == 4]
    contiguous = [p for p in weights if p.is_contiguous()]
    for p in weights:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for p in contiguous:
            p.data = p.data.contiguous()


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the block the hooks are there; afterwards all are removed."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching(model: nn.Module, names: Iterable[str], seen: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Calls `seen(name, layer, input)` whenever one of the named layers runs: its first tensor, detached."""
    handles = []
    for name in names:

        def hook(layer, args, kwargs, name=name):
            seen(name, layer, next(tensors_in((*args, *kwargs.values()))).detach())

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    with attached(handles):
        yield


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, in their order, also those inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
