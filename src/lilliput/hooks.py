"""Looking into a model while it runs: evaluation mode for a while, and what reaches its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
def watching(model: nn.Module, names: Iterable[str], seen: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Calls `seen(name, layer, input)` whenever one of the named layers runs; the input is detached."""
    handles = []
    for name in names:

        def hook(layer, args, name=name):
            seen(name, layer, args[0].detach())

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, in their order, also those inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
