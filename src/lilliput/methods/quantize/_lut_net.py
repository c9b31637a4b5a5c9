"""A network that runs by integer indices: sums of looked-up products, activation tables, encoding in between."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.quantize.lookup_tables import (
    Book,
    TableConv2d,
    TableLinear,
    kmeans,
    nearest,
    sampled_inputs,
    table_layer,
)
from lilliput.workload import Workload

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)  # rising ones: pooling may come before or after them
SHAPING = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity)
Tables = TableLinear | TableConv2d


class ActivationTable(nn.Module):
    """An activation function as pairs (input, output): the nearest input wins."""

    def __init__(self, inputs: Tensor, outputs: Tensor):
        super().__init__()
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[nearest(x, self.inputs)]


class LUTNet(nn.Module):
    """An `nn.Sequential` of table layers, activation tables, max pooling and Flatten.

    An activation is looked up together with the index of the next layer's input, so what leaves a layer is encoded
    again. Codebooks are sorted, so pooling takes the largest index. `lookup=False` decodes the indices and multiplies
    instead: the faster way here to the same sums, up to the rounding of float32.
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        known = (TableLinear, TableConv2d, ActivationTable, *SHAPING)
        foreign = [type(m).__name__ for m in layers if not isinstance(m, known)]
        if foreign or not any(isinstance(m, Tables) for m in layers):
            raise UserError(
                f"a LUTNet runs table layers, activations, MaxPool2d and Flatten, not {foreign or 'nothing'}"
            )
        self.layers = layers

    @torch.no_grad()
    def forward(self, input: Tensor, lookup: bool = True) -> Tensor:
        books = self._books()
        x = nearest(input, next(books))  # indices, or sums behind a table layer
        encoded, book = True, next(books, None)
        for module in self.layers:
            if isinstance(module, Tables):
                a = x if encoded else nearest(x, module.input_book)
                x = module.sums(a) if lookup else module(module.input_book[a])
                encoded = False
            elif isinstance(module, ActivationTable) and book is not None:
                x, encoded = nearest(module.outputs, book)[nearest(x, module.inputs)], True
                book = next(books, None)
            elif isinstance(module, nn.MaxPool2d):
                x = module(x.float()).to(x.dtype)
            else:
                x = module(x)
        return x

    def _books(self) -> Iterator[Tensor]:
        return (module.input_book for module in self.layers if isinstance(module, Tables))

    @property
    def index_bytes(self) -> int:
        """Bytes of the packed indices of all weights."""
        return sum(module.codes.nbytes for module in self.layers if isinstance(module, Tables))

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables of products and activations, float32."""
        products = sum(module.table_bytes for module in self.layers if isinstance(module, Tables))
        return products + sum(8 * len(m.inputs) for m in self.layers if isinstance(m, ActivationTable))


def compose(
    model: nn.Sequential,
    workload: Workload,
    weights: int = 32,
    inputs: int = 32,
    activations: int = 64,
    book: Book = kmeans,
    samples: int = 65_536,
) -> LUTNet:
    """The network of indices for a float one; inputs and activations are clustered on the calibration data.

    `weights`, `inputs` and `activations` are entries of the codebooks, `book` makes the first two.
    Raises UserError for layers other than Linear, Conv2d, activations that rise, max pooling and Flatten.
    """
    wanted = [n for n, m in model.named_children() if isinstance(m, (nn.Linear, nn.Conv2d, *ACTIVATIONS))]
    seen = sampled_inputs(model, workload, wanted, workload.calibration, samples)
    layers = {
        name: _tabled(module, seen.get(name), weights, inputs, activations, book)
        for name, module in model.named_children()
    }
    return LUTNet(nn.Sequential(*layers.values())).eval()


def _tabled(
    module: nn.Module, seen: Tensor | None, weights: int, inputs: int, activations: int, book: Book
) -> nn.Module:
    if isinstance(module, ACTIVATIONS):
        assert seen is not None
        places = kmeans(seen, activations)
        return ActivationTable(places, module(places))
    if isinstance(module, nn.Linear | nn.Conv2d):
        assert seen is not None
        return table_layer(module, book(module.get_parameter("weight"), weights), book(seen, inputs))
    return module
