"""What the experiments on binary networks share: training on Fashion-MNIST, accuracy as packed, times taken in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput._probe import torch_threads
from lilliput.methods.quantize.binary import KeepLatent, pack
from lilliput.metrics.memory import weight_bytes
from lilliput.paper import Row
from lilliput.papers._low_rank import Effort, interleave, middle, pictures_work
from lilliput.training import train


@dataclass
class Trained:
    """Accuracies of one contender, a value per seed, as it is served; the last network of them."""

    accuracies: list[float]
    network: nn.Module

    def row(self, name: str, extra: Mapping[str, float] = {}, spread: Mapping[str, float] = {}) -> Row:
        """Accuracy with its standard deviation over seeds, bytes of the network, and what else is known."""
        deviation = statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0
        values = {"accuracy_percent": statistics.fmean(self.accuracies), "network_bytes": weight_bytes(self.network)}
        return Row(name, {**values, **extra}, {"accuracy_percent": deviation, **spread})


def trained(build: Callable[[], nn.Module], seed: int, effort: Effort, lr: float) -> Trained:
    """Train `build()` once for each seed, score it on the test pictures in the form that is served.

    Seeds set the first weights, which pictures are seen and their order; contenders share them.
    """
    accuracies, network = [], nn.Module()
    for s in range(seed, seed + effort.seeds):
        torch.manual_seed(s)
        model = build()
        work = pictures_work(model, s, effort)
        batches = list(work.training or ())
        train(model, batches, work.loss, steps=effort.steps, lr=lr, callbacks=[KeepLatent()], seed=s)
        network = pack(model).eval()
        accuracies.append(work.score(network, "test").value)
    return Trained(accuracies, network)


def one_thread_ms(runs: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each layer on the same input, in turn, on one thread."""
    with torch_threads(1), torch.inference_mode():
        return interleave({name: lambda run=run: run(x) for name, run in runs.items()}, rounds)


def timing(times: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
    """Median and interquartile range as a row has them."""
    mid, spread = middle(list(times))
    return {"layer_ms": mid}, {"layer_ms": spread}
