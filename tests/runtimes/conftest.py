"""Small feed-forward networks of the kinds that the graph runtimes must execute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.workload import Workload


class Mobile(nn.Module):
    """A stem, an inverted residual with a depthwise convolution, a strided convolution: (B, 3, 16, 16) -> (B, 10)."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.expand, self.expand_bn = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depth, self.depth_bn = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.project, self.project_bn = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, input):
        x = F.relu6(self.stem_bn(self.stem(input)))
        y = F.relu6(self.expand_bn(self.expand(x)))
        y = F.relu6(self.depth_bn(self.depth(y)))
        x = x + self.project_bn(self.project(y))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.down(x)), 1).flatten(1))


class Vit(nn.Module):
    """Two transformer blocks over 4 x 4 patches: (B, 3, 16, 16) -> (B, 10)."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, input):
        x = self.patches(input).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            b, n, c = x.shape
            qkv = block["qkv"](block["norm1"](x)).reshape(b, n, 3, self.heads, c // self.heads)
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            x = x + block["out"](attended.transpose(1, 2).reshape(b, n, c))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(1))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


def _work(model: nn.Module) -> Workload:
    generator = torch.Generator().manual_seed(3)
    splits = []
    for _ in range(3):
        inputs = [torch.randn(6, 3, 16, 16, generator=generator) for _ in range(2)]
        splits.append([{"input": x, "label": torch.zeros(6, dtype=torch.long)} for x in inputs])
    return Workload.classifier(model, *splits)


@pytest.fixture
def mobile_work():
    torch.manual_seed(0)
    model = Mobile()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 16, 16))
    return _work(model.eval())


@pytest.fixture
def vit_work():
    torch.manual_seed(0)
    return _work(Vit().eval())


@pytest.fixture(params=["cnn_work", "mobile_work", "vit_work"])
def any_work(request):
    """Each of the feed-forward workloads in turn."""
    return request.getfixturevalue(request.param)
