"""Looking into a model while it runs: evaluation mode for a while, and what reaches its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
