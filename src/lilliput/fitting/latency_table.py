"""How long one linear layer takes on this machine, by shape and format: a few shapes are timed, the rest interpolated.

Each format is timed on layers that cycle through more memory than the last-level cache holds, as they are in decoding.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput import __version__
from lilliput.cache import folder, write_atomically
from lilliput.device import Device
from lilliput.method import Method
from lilliput.workload import ACCURACY, Workload

ROWS = 64  # that are packed to be repeated: whole blocks of every layout
WORKING_SET_BYTES = 64_000_000
Shape = tuple[int, int]  # (out_features, in_features)


@dataclass
class LatencyTable:
    """Milliseconds of format f on (N, K):  fixed_f + slope_f N K, from the timed shapes."""

    coefficients: dict[str, tuple[float, float]]

    def ms(self, label: str, shape: Shape) -> float:
        """Predicted milliseconds of one product with a single row of input."""
        fixed, slope = self.coefficients[label]
        return fixed + slope * shape[0] * shape[1]


@dataclass
class ModelledTable:
    """The same for a device that is not at hand: bytes over bandwidth or operations over peak, "modelled"."""

    device: Device
    threads: int
    bytes_of: Callable[[str, Shape], int]

    def ms(self, label: str, shape: Shape) -> float:
        """Modelled milliseconds of one product with a single row of input."""
        dtype, ops = "fp32" if label == "float32" else "int8", 2.0 * shape[0] * shape[1]
        return self.device.roofline_ms(self.bytes_of(label, shape), ops, dtype, self.threads, self.device.memory_bytes)


def latency_table(formats: dict[str, Method | None], shapes: Iterable[Shape], threads: int) -> LatencyTable:
    """Time every format on every shape, once for each machine, torch and set of shapes; later calls read the cache."""
    shapes = sorted(set(shapes))
    key = sha256(repr((Device.here().name, torch.__version__, __version__, threads, shapes)).encode()).hexdigest()
    path = folder("latency") / f"{key[:16]}.json"
    known = _read(path)
    missing = {label: m for label, m in formats.items() if label not in known}
    for label, method in missing.items():
        times = [_time_ms(_layer(shape, method)) for shape in shapes]
        known[label] = _fit(shapes, times)
    if missing:
        write_atomically(path, json.dumps(known).encode())
    return LatencyTable({label: (known[label][0], known[label][1]) for label in formats})


def _read(path) -> dict[str, list[float]]:
    try:
        data = json.loads(path.read_text())
        return {k: [float(v[0]), float(v[1])] for k, v in data.items()}
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        return {}


def _layer(shape: Shape, method: Method | None) -> nn.Module:
    """A linear layer of that shape in that format. A packed one repeats some packed rows: no time depends on values."""
    n, k = shape
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n if method is None else ROWS, bias=False))
    if method is None:
        return model[0]
    batch = {"input": torch.randn(ROWS, k)}
    data = Workload(model, [batch], [batch], [batch], ACCURACY, batch)
    few: Any = method.apply_(model, data, {"0": method})[0]
    layer = type(few)(**(few.rebuild_config() | {"out_features": n}))
    stored = few.state_dict()
    layer.load_state_dict({name: _repeated(stored[name], like) for name, like in layer.state_dict().items()})
    return layer


def _repeated(values: Tensor, like: Tensor) -> Tensor:
    """The values again and again, in the shape of `like`."""
    times = -(-like.numel() // values.numel())
    return values.flatten().repeat(times)[: like.numel()].view(like.shape)


@torch.inference_mode()
def _time_ms(layer: nn.Module, seconds: float = 0.08) -> float:
    """Median milliseconds of one call while cycling through copies of the layer."""
    size = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    x = torch.randn(1, layer.in_features)  # type: ignore[arg-type]
    layer(x)
    copies = [layer] + [copy.deepcopy(layer) for _ in range(min(63, int(WORKING_SET_BYTES / size)))]
    times = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 3:
        start = time.perf_counter()
        for layer in copies:
            layer(x)
        times.append((time.perf_counter() - start) / len(copies))
    return float(np.median(times)) * 1e3


def _fit(shapes: list[Shape], times: list[float]) -> list[float]:
    """Fixed cost and slope, neither negative, by relative least squares."""
    sizes = np.array([n * k for n, k in shapes], float)
    weights = 1 / np.maximum(np.array(times), 1e-6)
    design = np.stack([weights, sizes * weights], 1)
    fixed, slope = np.linalg.lstsq(design, np.array(times) * weights, rcond=None)[0]
    if fixed < 0:
        fixed, slope = 0.0, float(np.median(np.array(times) / sizes))
    return [float(fixed), float(max(slope, 0.0))]
