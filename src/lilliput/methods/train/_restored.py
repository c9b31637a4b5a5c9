"""Adapt, answer, restore: a model that may be trained for a while and is afterwards what it was, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import UserError


@contextmanager
def restored(model: nn.Module, changing: Collection[str] | None = None) -> Iterator[nn.Module]:
    """Whatever the block does to the model is undone at its end, also after an error and after Ctrl-C.

    Put back are the values and the storage of parameters and buffers, their gradients and `requires_grad`, the mode of
    each module, hooks, and modules that were added or replaced. With `changing` only the named parameters are copied,
    and only they require a gradient inside; without it everything is copied, as memory for a second model. Raises
    UserError for an unknown name, and at the end when a parameter that is not named was written to.
    """
    saved = _Saved(model, changing)
    try:
        if changing is not None:
            saved.freeze_others_()
        yield model
    finally:
        _surely(saved.put_back_)
    saved.refuse_changes()


def _surely(action: Callable[[], None]) -> None:
    """Does what may be begun anew until it came to its end; a Ctrl-C meanwhile is raised afterwards."""
    pressed = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as interrupt:
            pressed = interrupt
    if pressed is not None:
        raise pressed


class _Saved:
    """What a model was."""

    def __init__(self, model: nn.Module, changing: Collection[str] | None):
        self.modules = [_Module(module) for module in model.modules()]
        parameters = dict(model.named_parameters())
        if unknown := set(changing or ()) - set(parameters):
            raise UserError(f"{type(model).__name__} has no parameter {', '.join(sorted(unknown))}")
        copied = parameters.keys() if changing is None else changing
        self.parameters = {name: _Tensor(p, name in copied) for name, p in parameters.items()}
        self.buffers = [_Tensor(buffer, True) for buffer in model.buffers()]

    def freeze_others_(self) -> None:
        """Gradients for the copied parameters alone, starting without any."""
        for saved in self.parameters.values():
            saved.tensor.requires_grad_(saved.copy is not None)
            saved.tensor.grad = None

    @torch.inference_mode()
    def put_back_(self) -> None:
        """The model as it was; may be called again when it was cut short."""
        for module in self.modules:
            module.put_back_()
        for saved in [*self.parameters.values(), *self.buffers]:
            saved.put_back_()

    def refuse_changes(self) -> None:
        """Raises UserError when a parameter was written to of which there is no copy."""
        if written := [name for name, saved in self.parameters.items() if saved.is_lost()]:
            raise UserError(
                f"{', '.join(written[:3])} was changed in place, but only the parameters that `changing` names are "
                "copied and restored; name it too"
            )


class _Module:
    """The attributes of a module, and what its dictionaries, sets and lists held."""

    def __init__(self, module: nn.Module):
        self.module, self.attributes = module, dict(vars(module))
        self.contents = [(v, copy.copy(v)) for v in self.attributes.values() if isinstance(v, dict | set | list)]

    def put_back_(self) -> None:
        own: dict[str, Any] = vars(self.module)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        for container, held in self.contents:  # in place: handles of hooks know these very objects
            container.clear()
            container.extend(held) if isinstance(container, list) else container.update(held)


class _Tensor:
    """A parameter or buffer: its storage, flags and gradient, and on demand a copy of its values."""

    def __init__(self, tensor: Tensor, copied: bool):
        self.tensor, self.data, self.requires_grad, self.grad = tensor, tensor.data, tensor.requires_grad, tensor.grad
        self.copy = self.data.clone() if copied else None
        self.version = None if tensor.is_inference() else tensor._version

    def put_back_(self) -> None:
        self.tensor.data = self.data
        if self.copy is not None:
            self.data.copy_(self.copy)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
        self.tensor.grad = self.grad

    def is_lost(self) -> bool:
        return self.copy is None and self.version is not None and self.tensor._version != self.version
