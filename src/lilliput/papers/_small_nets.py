"""What the experiments on many small networks share: their pictures, their training and one size of network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.training import train
from lilliput.workload import Batch
from lilliput.zoo import nets
from lilliput.zoo.images import Pictures

BATCH, LR = 64, 3e-3
Penalty = Callable[[nn.Module], Tensor]


def drawn(pictures: Pictures, count: int, seed: int) -> Pictures:
    """`count` of the pictures, or all there are, drawn without replacement."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return picked(pictures, order)


def picked(pictures: Pictures, index: Tensor) -> Pictures:
    """The pictures of an index or a mask."""
    return replace(pictures, pixels=pictures.pixels[index], labels=pictures.labels[index])


def small_net(seed: int) -> nn.Module:
    """A ResNet of 8 layers for 1x28x28; its head reads means of what a ReLU gave."""
    torch.manual_seed(seed)
    return nets.resnet(width=8, depth=8, stem_stride=2)


def trained(
    pictures: Pictures,
    steps: int,
    seed: int,
    penalty: Penalty | None = None,
    build: Callable[[int], nn.Module] = small_net,
) -> nn.Module:
    """A small network, `build(seed)`, trained from scratch; `penalty(model)` is added to the loss."""
    model = build(seed)
    batches: Sequence[Batch] = list(pictures.batches(BATCH))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        value = F.cross_entropy(net(batch["input"]), batch["label"])
        return value if penalty is None else value + penalty(net)

    train(model, batches, loss, steps=steps, lr=LR, clip_norm=1.0, seed=seed)
    return model.eval()
