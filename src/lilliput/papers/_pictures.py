"""What the experiments on quantized Fashion-MNIST networks share: seeded calibration draws and tables of accuracies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

import torch

from lilliput.paper import Row
from lilliput.workload import Classifier, Workload
from lilliput.zoo import images, nets
from lilliput.zoo.images import Pictures

NETS = ("resnet-small", "mobilenet-small")


def pictures_workload(net: str, calibration: int, test: int) -> Classifier:
    """A shipped network with the first pictures of the fixed calibration and test splits."""
    splits = images.fashion_mnist()
    parts = (splits["calibration"].first(calibration), splits["validation"].first(64), splits["test"].first(test))
    return Workload.classifier(nets.load(net), *(list(part.batches(64)) for part in parts), name=net)


def calibration_draw(pictures: Pictures, count: int, seed: int) -> list[dict]:
    """Batches of `count` pictures drawn without replacement."""
    pick = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return list(Pictures(pictures.pixels[pick], pictures.labels[pick], pictures.prepare).batches(64))


def accuracy_percent(model, workload: Workload) -> float:
    """Accuracy on the test split."""
    return workload.score(model, "test").value


class Table:
    """Measurements by contender and quantity; several of one quantity are repeats."""

    def __init__(self):
        self._found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, contender: str, quantity: str, value: float) -> None:
        self._found[contender][quantity].append(value)

    def all(self, contender: str, quantity: str) -> list[float]:
        """Every measurement of one quantity, in the order they were made."""
        return self._found[contender][quantity]

    def rows(self) -> list[Row]:
        """One row per contender: means, and standard deviations where there were repeats."""
        return [
            Row(name, {k: statistics.fmean(v) for k, v in found.items()}, {k: _deviation(v) for k, v in found.items()})
            for name, found in self._found.items()
        ]


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def average(row: Row, quantities: Iterable[str]) -> tuple[float, float]:
    """Mean of several quantities of a row, and the standard deviation of that mean from their spreads."""
    names = list(quantities)
    spread = sum(row.spread[name] ** 2 for name in names) ** 0.5 / len(names)
    return statistics.fmean(row.values[name] for name in names), spread


def margin(ours: Row, other: Row, quantities: Iterable[str]) -> tuple[float, float]:
    """Mean advantage of one row over another, and the joint standard deviation of that difference."""
    names = list(quantities)
    (a, spread_a), (b, spread_b) = average(ours, names), average(other, names)
    return a - b, (spread_a**2 + spread_b**2) ** 0.5
