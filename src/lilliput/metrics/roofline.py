"""The physical limit of a model on a device, and how close a measured latency comes to it.

Per layer: t >= max(operations / peak, weight bytes / bandwidth of all weights + activation bytes / bandwidth of them).
What is not counted (normalisation, attention products, copies) only makes the limit lower: it stays a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.hooks import attached
from lilliput.metrics.memory import weight_bytes

_COUNTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "int8"}


@dataclass(frozen=True)
class LayerCost:
    """What one call of a layer moves and computes; a multiply-add is two operations."""

    name: str
    weight_bytes: int
    activation_bytes: int  # input and output
    ops: int
    dtype: str  # of the arithmetic: fp32, bf16, int8, ...


@dataclass(frozen=True)
class Roofline:
    """The limit, the share of it that was reached (1 is perfect), the level that holds the weights, what binds."""

    limit_ms: float
    share_reached: float
    level: str
    bound: str  # "bandwidth" or "compute", whichever takes most of the limit


def layer_costs(model: nn.Module, *args: Any, **kwargs: Any) -> list[LayerCost]:
    """The costs of one forward pass `model(*args, **kwargs)`, in the order of the calls.

    Counted are linear layers, convolutions, embeddings and every module with a `weight_bytes` property (packed
    weights), whose operations follow from `in_features` and `out_features` and whose arithmetic from `compute_dtype`,
    by default int8.
    """
    costs: list[LayerCost] = []
    hooks = [
        module.register_forward_hook(
            lambda module, given, out, name=name: costs.append(_cost(name, module, given, out))
        )
        for name, module in _counted(model)
    ]
    with attached(hooks), torch.inference_mode():
        model(*args, **kwargs)
    return costs


def _counted(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are counted; what is inside a packed module belongs to it."""
    if hasattr(type(model), "weight_bytes") or isinstance(model, _COUNTED):
        yield name, model
        return
    for child_name, child in model.named_children():
        yield from _counted(child, f"{name}.{child_name}" if name else child_name)


def _cost(name: str, module: Any, given: tuple, out: Any) -> LayerCost:
    moved = sum(t.numel() * t.element_size() for t in (*given, out) if isinstance(t, Tensor))
    packed = hasattr(type(module), "weight_bytes")
    size = module.weight_bytes if packed else weight_bytes(module)
    if hasattr(module, "num_embeddings"):  # only the rows that are looked up move
        return LayerCost(name, size * given[0].numel() // module.num_embeddings, moved, 0, "fp32")
    dtype = getattr(module, "compute_dtype", "int8") if packed else _TYPES.get(module.weight.dtype, "fp32")
    return LayerCost(name, size, moved, _ops(module, out), dtype)


def _ops(module: Any, out: Any) -> int:
    outputs = out.numel() if isinstance(out, Tensor) else 0
    if hasattr(module, "kernel_size"):
        return 2 * outputs * math.prod(module.kernel_size) * (module.in_channels // module.groups)
    return 2 * outputs * getattr(module, "in_features", 0)


def limit_ms(costs: Iterable[LayerCost], device: Device, threads: int | None = None) -> tuple[float, str]:
    """(modelled lower bound of the latency in ms, "bandwidth" or "compute")."""
    costs = list(costs)
    held = sum(cost.weight_bytes for cost in costs)
    total = {"bandwidth": 0.0, "compute": 0.0}
    for cost in costs:
        moving = cost.weight_bytes / device.bandwidth(held, threads)
        moving += cost.activation_bytes / device.bandwidth(cost.activation_bytes, threads)
        computing = cost.ops / device.peak(cost.dtype, threads)
        total["compute" if computing > moving else "bandwidth"] += 1e3 * max(moving, computing)
    return sum(total.values()), max(total, key=lambda bound: total[bound])


def distance(costs: Iterable[LayerCost], device: Device, measured_ms: float, threads: int | None = None) -> Roofline:
    """How close `measured_ms` comes to the limit of these layers on `device`."""
    if not measured_ms > 0:
        raise UserError(f"the measured latency is {measured_ms} ms; it must be above zero")
    costs = list(costs)
    limit, bound = limit_ms(costs, device, threads)
    return Roofline(limit, limit / measured_ms, device.level(sum(cost.weight_bytes for cost in costs)), bound)
