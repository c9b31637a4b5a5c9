"""Small nets for the tests of circuits: random weights and statistics, of every kind that is compiled."""

import torch
from torch import nn

from lilliput.methods.quantize.binary import BinaryConv2d, BinaryLinear, pack
from lilliput.methods.quantize.lookup_tables import kmeans, table_layer
from lilliput.workload import Workload


def norm(channels, cls=nn.BatchNorm1d, positive=False):
    """A BatchNorm with statistics and weights of both signs."""
    layer = cls(channels)
    layer.running_mean.normal_(0, 2)
    layer.running_var.uniform_(0.5, 30)
    nn.init.normal_(layer.weight, 1.0 if positive else 0.0)
    if positive:
        layer.weight.data.abs_()
    nn.init.normal_(layer.bias)
    return layer


def binary_mlp(levels=1, shift=False, scale="layer"):
    """24 inputs of (1, 4, 6), two layers of signs, 6 classes."""
    signs = {"levels": levels, "scale": scale, "shift": shift, "bias": False}
    net = nn.Sequential(
        nn.Flatten(),
        BinaryLinear(24, 12, activations="real", scale=scale),
        norm(12),
        BinaryLinear(12, 8, **signs),
        norm(8),
        BinaryLinear(8, 6, **signs),
        norm(6),
    )
    for layer in net:
        if getattr(layer, "shift", None) is not None:
            nn.init.normal_(layer.shift, 0, 0.3)
        if getattr(layer, "levels", None) is not None:
            layer.levels.data = torch.tensor([0.9, 0.53, 0.21])[:levels] if levels > 1 else torch.ones(1)
    return pack(net).eval()


def binary_cnn():
    """(1, 7, 7): padded and strided convolutions of signs, pooling, 5 classes."""
    signs = {"bias": False, "scale": "layer"}
    return pack(
        nn.Sequential(
            BinaryConv2d(1, 4, 3, activations="real", padding=1, **signs),
            norm(4, nn.BatchNorm2d),
            nn.MaxPool2d(2),
            BinaryConv2d(4, 8, 3, padding=1, levels=2, **signs),
            norm(8, nn.BatchNorm2d),
            BinaryConv2d(8, 4, 2, stride=1, **signs),
            norm(4, nn.BatchNorm2d),
            nn.Flatten(),
            BinaryLinear(16, 5, **signs),
        )
    ).eval()


def table_cnn(entries=8, even=False):
    """(2, 8, 8): codebooks of weights and inputs, ReLU and pooling, 4 classes."""
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        norm(6, nn.BatchNorm2d),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 4),
    ]
    for i in (0, 4, 7):
        low = -2.0 if i == 0 else 0.0
        book = torch.linspace(low, 3.0, entries) if even else kmeans(torch.rand(500) ** 2 * (3 - low) + low, entries)
        layers[i] = table_layer(layers[i], kmeans(layers[i].weight, 8), book)
    return nn.Sequential(*layers).eval()


def work_of(net, shape, seed=0):
    """A classifier whose calibration inputs are on a grid of 256 values, with both ends."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (64, *shape), generator=generator)
    q.view(-1)[:2] = torch.tensor([0, 255])
    batch = {"input": q.float() / 255 * 5 - 2, "label": torch.zeros(64, dtype=torch.int64)}
    return Workload.classifier(net, [batch], [batch], [batch]), q.to(torch.uint8)


NETS = {
    "mlp-1": (lambda: binary_mlp(1), (1, 4, 6)),
    "mlp-1-shift": (lambda: binary_mlp(1, shift=True, scale="alpha"), (1, 4, 6)),
    "mlp-2": (lambda: binary_mlp(2), (1, 4, 6)),
    "mlp-3": (lambda: binary_mlp(3), (1, 4, 6)),
    "cnn": (binary_cnn, (1, 7, 7)),
    "tables": (table_cnn, (2, 8, 8)),
    "tables-16": (lambda: table_cnn(16), (2, 8, 8)),
    "even-64": (lambda: table_cnn(64, even=True), (2, 8, 8)),
}


def build(name):
    """Net, workload and bytes of a name, seeded."""
    torch.manual_seed(sum(map(ord, name)))
    make, shape = NETS[name]
    net = make()
    return net, *work_of(net, shape)
