"""What reaches a layer: second moments of its inputs, and the shapes it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.workload import Batch, Workload

Shape = tuple[int, ...]


def second_moments(model: nn.Module, workload: Workload, names: Iterable[str]) -> dict[str, Tensor]:
    """Name -> mean of x x^T over the calibration inputs of that Linear, (K, K) float32.

    Layers fed by the same tensor (queries, keys and values) share one result.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    leader: dict[str, str] = {}  # layer -> the first layer that saw the same tensor
    seen: tuple[Tensor, str] | None = None

    def see(name: str, x: Tensor) -> None:
        nonlocal seen
        if name not in leader:
            leader[name] = seen[1] if seen is not None and seen[0] is x else name
        seen = (x, leader[name])
        if leader[name] == name:
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            sums[name] = sums.get(name, torch.zeros(())) + flat.T @ flat
            rows[name] = rows.get(name, 0) + len(flat)

    watch(model, names, see, lambda: [workload.forward(model, batch) for batch in workload.calibration])
    return {name: sums[leader[name]] / rows[leader[name]] for name in names if name in leader}


def input_shapes(model: nn.Module, workload: Workload, names: Iterable[str], batch: Batch) -> dict[str, Shape]:
    """Name -> shape of the input a layer gets when the model runs the batch."""
    shapes: dict[str, Shape] = {}

    def see(name: str, x: Tensor) -> None:
        shapes.setdefault(name, tuple(x.shape))

    watch(model, names, see, lambda: workload.forward(model, batch))
    return shapes


def watch(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], object], run: Callable[[], object]
) -> None:
    """Call `see(name, input)` for each of the named layers while `run()` runs the model in evaluation."""

    def hook(name: str):
        def note(module, args) -> None:
            see(name, args[0])

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            run()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def need_workload(workload: Workload | None, method: str, why: str) -> Workload:
    """The workload, or a UserError that says what it is needed for."""
    if workload is None:
        raise UserError(f"{method} needs a workload {why}; pass one: .apply(model, workload)")
    return workload
