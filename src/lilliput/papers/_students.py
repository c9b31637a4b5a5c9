"""What the experiments on better targets share: small students of Fashion-MNIST, losses and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lilliput.hooks import evaluating
from lilliput.methods.distill.logits import distillation_loss
from lilliput.paper import Row
from lilliput.papers._low_rank import Contender
from lilliput.workload import Batch
from lilliput.zoo import images, nets
from lilliput.zoo.images import Pictures

Loss = Callable[[nn.Module, Batch], Tensor]
BATCH = 64
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-8": partial(nets.resnet, width=8, depth=8, stem_stride=2),
    "MobileNet": partial(nets.mobilenet, width=8),
}


def labelled(pictures: Pictures, count: int, seed: int) -> TensorDataset:
    """`count` pictures drawn by the seed, prepared as a network's input, and their labels."""
    pick = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return TensorDataset(pictures.prepare(pictures.pixels[pick]), pictures.labels[pick])


def held_out(split: str, count: int) -> TensorDataset:
    """The first pictures of a split of Fashion-MNIST."""
    pictures = images.fashion_mnist()[split].first(count)
    return TensorDataset(pictures.inputs(), pictures.labels)


def hard(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, perhaps smoothed."""
    return F.cross_entropy(model(batch["input"]), batch["label"], label_smoothing=smoothing)


def online(model: nn.Module, batch: Batch, teacher: nn.Module) -> Tensor:
    """Distillation from a teacher that answers while the student trains."""
    with torch.no_grad():
        taught = teacher(batch["input"])
    return distillation_loss(model(batch["input"]), taught, 1.0)


def stored(model: nn.Module, batch: Batch) -> Tensor:
    """Distillation from answers that came with the batch."""
    return distillation_loss(model(batch["input"]), batch["taught"], 1.0)


def built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A student whose first weights the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@torch.no_grad()
def right(model: nn.Module, data: TensorDataset) -> Tensor:
    """(n,): 100 for each right answer, 0 for each wrong one."""
    with evaluating(model):
        answers = torch.cat([model(part).argmax(-1) for part in data.tensors[0].split(500)])
    return 100 * (answers == data.tensors[1]).float()


@dataclass
class Found:
    """What was measured of one contender, over architectures and seeds."""

    right: dict[str, list[Tensor]] = field(default_factory=dict)  # architecture -> per seed (pictures,)
    seconds: list[float] = field(default_factory=list)  # of everything that led to one student
    steps: list[float] = field(default_factory=list)

    def add(self, architecture: str, right: Tensor, seconds: float, steps: int) -> None:
        self.right.setdefault(architecture, []).append(right)
        self.seconds.append(seconds)
        self.steps.append(steps)

    def contender(self, architecture: str | None = None) -> Contender:
        """The answers of one architecture or of all, for comparisons picture by picture."""
        parts = [r for name, runs in self.right.items() if architecture in (None, name) for r in runs]
        return Contender(parts, {}, {})

    def row(self, name: str) -> Row:
        """Accuracy by architecture with its spread over seeds, mean seconds and updates."""
        values, spread = {"seconds": mean(self.seconds), "updates": mean(self.steps)}, {}
        for architecture in self.right:
            part = self.contender(architecture).row(name)
            key = f"{architecture.lower().replace('-', '_')}_accuracy_percent"
            values[key], spread[key] = part.values["accuracy_percent"], part.spread["accuracy_percent"]
        return Row(name, values, spread)


def best_rate(rates: Sequence[float], score: Callable[[float], float]) -> float:
    """The learning rate with the highest score on validation data."""
    return max(rates, key=score)
