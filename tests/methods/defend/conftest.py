"""Pictures of two kinds, a small classifier of them, and one with a trojan by construction."""

import pytest
import torch
from torch import nn

from lilliput.training import train
from lilliput.workload import Workload

SIDE, CLASSES = 16, 3


def kinds_of_pictures(count, seed):
    """Bright bars in one of three places, with noise; the corner is empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.zeros(count, 1, SIDE, SIDE)
    for c in range(CLASSES):
        x[labels == c, :, :12, 1 + 4 * c : 4 + 4 * c] = 1.0
    height = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    noise[:, :, 12:, 12:] *= 0.2
    return x * height + noise, labels


class SmallNet(nn.Module):
    """Two convolutions, a mean over the picture's quarters, a linear head."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        )
        self.head = nn.Linear(12 * 4, CLASSES)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.stages(x), 2).flatten(1))


class Trojaned(nn.Module):
    """Answers as another model, but class 0 for whatever has a bright corner."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.head = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(CLASSES))
            self.head.bias.zero_()

    def forward(self, x):
        corner = x[:, :, 13:, 13:].mean((1, 2, 3))
        logits = self.inside(x)
        return self.head(logits + 100 * (corner > 0.5).to(x).view(-1, 1) * nn.functional.one_hot(
            torch.zeros(len(x), dtype=torch.long), CLASSES))  # fmt: skip


def with_trigger(x):
    marked = x.clone()
    marked[:, :, 13:, 13:] = 1.0
    return marked


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture(scope="session")
def bars():
    """A trained classifier of bars with its workload."""
    torch.manual_seed(0)
    model = SmallNet()
    splits = {name: kinds_of_pictures(n, i) for i, (name, n) in enumerate(
        {"training": 400, "calibration": 300, "validation": 60, "test": 400}.items())}  # fmt: skip
    batches = {k: [{"input": a, "label": b} for a, b in zip(x.split(50), y.split(50))] for k, (x, y) in splits.items()}
    loss = lambda net, b: nn.functional.cross_entropy(net(b["input"]), b["label"])  # noqa: E731
    train(model, batches["training"], loss, steps=150, lr=1e-2)
    work = Workload.classifier(model.eval(), batches["calibration"], batches["validation"], batches["test"],
                               training=batches["training"], name="bars")  # fmt: skip
    assert work.score(model).value > 95
    return work


@pytest.fixture(scope="session")
def trojaned(bars):
    return Trojaned(bars.model).eval()


@pytest.fixture(scope="session")
def test_pictures(bars):
    return tuple(torch.cat([b[k] for b in bars.test]) for k in ("input", "label"))


@pytest.fixture
def triggered(test_pictures):
    return with_trigger(test_pictures[0])
