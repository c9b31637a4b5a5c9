"""Walking calibration data through a model block by block: each layer sees what the changed layers before it make.

Holding the hidden states of all batches between two blocks costs one forward pass per block and no more memory than one
layer's activations; running the whole model again for every layer would cost the square of the depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.hooks import attached, evaluating, watching

if TYPE_CHECKING:
    from lilliput.workload import Batch, Workload


class _Enough(Exception):
    """Ends a forward pass whose rest is of no interest."""


def some_batches(workload: Workload, samples: int) -> list[Batch]:
    """Leading calibration batches that hold at least `samples` tokens (text) or inputs (anything else)."""
    found, seen = [], 0
    for batch in workload.calibration:
        found.append(batch)
        first = batch.get("input_ids", next(iter(batch.values())))
        seen += first.numel() if "input_ids" in batch else len(first)
        if seen >= samples:
            break
    return found


def execution_order(model: nn.Module, workload: Workload, names: Sequence[str]) -> list[str]:
    """The names in the order in which the layers first run; those that never run come last."""
    order: list[str] = []

    def seen(name: str, layer: nn.Module, x: Tensor) -> None:
        if name not in order:
            order.append(name)

    with torch.no_grad(), evaluating(model), watching(model, names, seen):
        workload.forward(model, workload.calibration[0])
    return order + [name for name in names if name not in order]


def first_inputs(model: nn.Module, workload: Workload, batch: Batch, name: str) -> list[Tensor]:
    """The input of a layer's first call for one batch (empty when it never runs); what comes after it is not run."""
    found: list[Tensor] = []

    def seen(_: str, layer: nn.Module, x: Tensor) -> None:
        found.append(x)
        raise _Enough

    with torch.no_grad(), watching(model, [name], seen), suppress(_Enough):
        workload.forward(model, batch)
    return found


class BlockWalk:
    """The hidden states of all batches in front of one block of a model, moved forward by `advance_`."""

    def __init__(self, model: nn.Module, workload: Workload, batches: Sequence[Batch], blocks: Sequence[str]):
        self.model, self.blocks = model, list(blocks)
        self.hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        for batch in batches if self.blocks else ():
            self._capture(workload, batch)

    @property
    def batches(self) -> range:
        return range(len(self.hidden))

    @torch.no_grad()
    def run(self, block: int, batch: int) -> Tensor:
        """Output of a block for one batch, given its hidden states as they are now."""
        args, kwargs = self._calls[batch][block]
        return self.model.get_submodule(self.blocks[block])(self.hidden[batch], *args, **kwargs)

    def advance_(self, block: int) -> None:
        """Replace the hidden states by the block's outputs."""
        for batch in self.batches:
            self.hidden[batch] = self.run(block, batch)

    def _capture(self, workload: Workload, batch: Batch) -> None:
        """One pass in which blocks do nothing but note how they are called (masks and positions differ per block)."""
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def noted(hidden: Tensor, *args, **kwargs) -> Tensor:
            if not calls:
                self.hidden.append(hidden)
            calls.append((args, {k: None if k == "past_key_values" else v for k, v in kwargs.items()}))
            if len(calls) == len(self.blocks):
                raise _Enough
            return hidden

        with torch.no_grad(), _forwards(self.model, self.blocks, noted), suppress(_Enough):
            workload.forward(self.model, batch)
        self._calls.append(calls)


@contextmanager
def _forwards(model: nn.Module, names: Sequence[str], forward) -> Iterator[None]:
    modules = [model.get_submodule(name) for name in names]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def walkable_blocks(model: nn.Module, workload: Workload) -> list[str]:
    """Names of the transformer blocks when they run once each, in order, from tensor to tensor; else an empty list."""
    names = [block.name for block in anatomy(model).blocks]
    ran: list[str] = []

    def note(name: str):
        def hook(module, args, out):
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and out.shape == args[0].shape:
                ran.append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with attached(handles), torch.no_grad(), evaluating(model):
        workload.forward(model, {k: v[:1] for k, v in workload.calibration[0].items()})
    return names if ran == names else []


def names_in(block: str, names: Sequence[str]) -> list[str]:
    """Those of the names that lie inside a block."""
    return [name for name in names if name.startswith(block + ".")]
