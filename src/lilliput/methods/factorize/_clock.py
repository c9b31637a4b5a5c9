"""How long one layer takes at its real input shape: what `targeted` decides by. Milliseconds throughout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lilliput.runtimes import find_runtime
from lilliput.workload import Workload

Shape = tuple[int, ...]
TimeMs = Callable[[nn.Module, Shape], float]
BURST_MS = 3.0  # one reading repeats the layer for about this long, so that the clock's own cost vanishes


class Clock:
    """`clock(module, input_shape)` -> milliseconds of one call, by a prepared and warmed-up runner that is kept.

    Keeping the runners makes readings of two modules in turn (ABAB) cheap and warm.
    """

    def __init__(self, prepare: Callable[[nn.Module, Tensor], Callable[[], object]]):
        self.prepare = prepare
        self.runners: dict[tuple[int, Shape], tuple[Callable[[], object], int, nn.Module]] = {}

    def __call__(self, module: nn.Module, shape: Shape) -> float:
        key = id(module), shape
        if key not in self.runners:
            run = self.prepare(module, torch.randn(shape))
            self.runners[key] = run, self._calls_per_burst(run), module  # the module is held so its id stays its own
        run, calls, _ = self.runners[key]
        return _burst_ms(run, calls)

    @staticmethod
    def _calls_per_burst(run: Callable[[], object]) -> int:
        for _ in range(3):
            run()
        return max(1, min(1000, int(BURST_MS / max(_burst_ms(run, 3), 1e-4))))


def _burst_ms(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1000 / calls


def torch_inference(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward of a module in eager torch."""
    module = module.eval()

    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def torch_training(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward of a module, gradients of its input included, as in the middle of a network."""
    module = module.train().requires_grad_(True)
    x = x.requires_grad_(True)

    def run() -> object:
        module.zero_grad(set_to_none=True)
        x.grad = None
        y = module(x)
        return y.backward(torch.ones_like(y))

    return run


def openvino_inference(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward of a module compiled by OpenVINO, which serves feed-forward networks."""
    batch = {"input": x, "label": torch.zeros(len(x), dtype=torch.long)}
    work = Workload.classifier(module.eval(), [batch], [batch], [batch], example=batch)
    session = find_runtime("openvino").prepare(module, work, threads=torch.get_num_threads())
    return lambda: session(batch)


RUNNERS = {"openvino": openvino_inference, "torch": torch_inference}


def paired_ms(
    clock: TimeMs, before: nn.Module, after: nn.Module, shape: Shape, rounds: int
) -> list[tuple[float, float]]:
    """`rounds` readings of both modules in turn (ABAB), so that a drifting machine hits both alike."""
    return [(clock(before, shape), clock(after, shape)) for _ in range(rounds)]


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """The median over rounds of after / before."""
    return statistics.median(after / max(before, 1e-9) for before, after in pairs)
