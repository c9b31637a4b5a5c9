"""Products as table lookups: weights and inputs become indices into small codebooks.   y_n = sum_k P[a_k, c_nk] + b_n

P holds the products of a layer's u input entries and w weight entries, a_k is the entry nearest to input k, c_nk the
entry of the weight. The layers store indices and codebooks; in torch they compute the same sums by decoding, since a
gather is slower than a matrix product: size only. `sums` adds up table entries by integer indices alone, and
`_lut_net.LUTNet` runs a whole network so.

Paper: Imani, Samragh, Kim, Gupta, Koushanfar & Rosing, "RAPIDNN: In-Memory Deep Neural Network Acceleration
Framework", 2018, arXiv 1806.05794.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import evaluating, watching
from lilliput.method import (
    BLOCK_COUNT,
    FLOAT_WEIGHTS,
    LAYER_SHAPES,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    UNLABELLED,
    Facts,
    Method,
    knob,
)
from lilliput.methods.quantize._coded import codable
from lilliput.methods.quantize._packed import pack_codes, unpack_codes
from lilliput.workload import Batch, Workload, need_workload

ENTRIES = (4, 8, 16, 32, 64)
CLUSTERED = 1 << 16  # values that a codebook is made from
GATHERED = 1 << 21  # table entries looked up at a time
Book = Callable[[Tensor, int], Tensor]  # values and a number of entries -> entries, sorted


# --- codebooks -------------------------------------------------------------------------------------------------


def kmeans(values: Tensor, entries: int, rounds: int = 30) -> Tensor:
    """Sorted centres (entries,) of k-means on a line, from quantiles of the distinct values."""
    values = _sample(values)
    distinct = values.unique()
    centres = distinct[torch.linspace(0, len(distinct) - 1, entries).round().long()]
    for _ in range(rounds):
        index = nearest(values, centres)
        count = torch.bincount(index, minlength=entries)
        total = torch.zeros(entries, dtype=torch.float64).index_add_(0, index, values.double())
        before, centres = centres, torch.where(count > 0, (total / count.clamp_min(1)).float(), centres).sort().values
        if torch.equal(before, centres):
            break
    return centres


def uniform(values: Tensor, entries: int) -> Tensor:
    """Evenly spaced entries over the range, or a smaller one (down to 30 %) where that lowers the squared error."""
    values = _sample(values)
    low, high = values.min(), values.max()
    books = [torch.linspace(float(low * s), float(high * s), entries) for s in torch.linspace(1.0, 0.3, 15).tolist()]
    return min(books, key=lambda book: float((book[nearest(values, book)] - values).square().sum()))


def _sample(values: Tensor) -> Tensor:
    """At most CLUSTERED of the values, evenly taken. Raises UserError when there are none or one is not finite."""
    values = values.detach().float().flatten()
    if not len(values) or not torch.isfinite(values).all():
        raise UserError("there are no values to cluster, or one is NaN or infinite; check the weights and the data")
    return values if len(values) <= CLUSTERED else values[torch.linspace(0, len(values) - 1, CLUSTERED).round().long()]


def with_zero(book: Tensor) -> Tensor:
    """The book with the entry nearest to zero moved there: the padding of a convolution is then an entry."""
    return torch.where(torch.arange(len(book)) == book.abs().argmin(), 0.0, book)


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index of the entry of a sorted book that is nearest to each value, int64."""
    return torch.bucketize(x.float().contiguous(), (book[1:] + book[:-1]) / 2)


# --- layers ----------------------------------------------------------------------------------------------------


class _Tables(nn.Module):
    """Packed weight indices (N, K) and both codebooks."""

    codes: Tensor
    weight_book: Tensor
    input_book: Tensor
    bias: Tensor | None

    def __init__(self, rows: int, columns: int, weights: int, inputs: int, bias: bool):
        super().__init__()
        if weights not in (2, 4, 8, 16, 32, 64, 128) or inputs < 2:
            raise UserError(f"the books have {weights} and {inputs} entries; give a power of two up to 128 for weights")
        self.rows, self.columns, self.weights, self.inputs = rows, columns, weights, inputs
        self.bits = weights.bit_length() - 1
        self.register_buffer("codes", torch.zeros(rows, math.ceil(columns / 8) * self.bits, dtype=torch.uint8))
        self.register_buffer("weight_book", torch.zeros(weights))
        self.register_buffer("input_book", torch.zeros(inputs))
        self.register_buffer("bias", torch.zeros(rows) if bias else None)

    def set_(self, w: Tensor, weight_book: Tensor, input_book: Tensor, bias: Tensor | None) -> None:
        """Take weights (N, ...), rounded to the entries of `weight_book`, and the other tensors."""
        self.codes = pack_codes(nearest(w.detach().flatten(1), weight_book), self.bits)
        self.weight_book, self.input_book = weight_book.clone(), input_book.clone()
        self.bias = None if bias is None else bias.detach().float().clone()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights' indices and both codebooks."""
        return self.codes.nbytes + self.weight_book.nbytes + self.input_book.nbytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of products in float32, which is made from the codebooks."""
        return 4 * self.weights * self.inputs

    def products(self) -> Tensor:
        """(inputs, weights): the product of each pair of entries."""
        return torch.outer(self.input_book, self.weight_book)

    def indices(self) -> Tensor:
        """Weight indices (N, K)."""
        return unpack_codes(self.codes, self.bits, self.columns)

    def decoded(self) -> Tensor:
        """The weights that the indices stand for, (N, K)."""
        return self.weight_book[self.indices()]

    def rounded(self, x: Tensor) -> Tensor:
        """The entries nearest to x, in the type of x; NaN stays."""
        return torch.where(x.isnan(), x, self.input_book[nearest(x, self.input_book)].to(x.dtype))

    def _add_up(self, a: Tensor, c: Tensor) -> Tensor:
        """Input indices (M, K) and weight indices (N, K) -> sums of their products (M, N), nothing multiplied."""
        table, c = self.products().flatten(), c.long()
        chunk = max(1, GATHERED // max(1, c.numel()))
        parts = [table[(rows.unsqueeze(1) * self.weights) + c].sum(-1) for rows in a.split(chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, len(c))


class TableLinear(_Tables):
    """A linear layer that reads indices of its weights and of its inputs."""

    def __init__(self, in_features: int, out_features: int, weights: int = 32, inputs: int = 32, bias: bool = True):
        super().__init__(out_features, in_features, weights, inputs, bias)
        self.in_features, self.out_features = in_features, out_features

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"weights": self.weights, "inputs": self.inputs, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.rounded(x), self.decoded().to(x.dtype), bias)

    def sums(self, a: Tensor) -> Tensor:
        """Input indices (M, K) -> outputs (M, N) by looking up products."""
        y = self._add_up(a, self.indices())
        return y if self.bias is None else y + self.bias


class TableConv2d(_Tables):
    """A zero-padded 2-D convolution that reads indices of its weights and of its inputs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        weights: int = 32,
        inputs: int = 32,
        bias: bool = True,
    ):
        super().__init__(out_channels, in_channels // groups * math.prod(kernel_size), weights, inputs, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        shape = ("kernel_size", "stride", "padding", "dilation")
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "groups", "weights", "inputs")}
        return sizes | {name: list(getattr(self, name)) for name in shape} | {"bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.decoded().to(x.dtype).view(self.rows, -1, *self.kernel_size)
        return F.conv2d(self.rounded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def sums(self, a: Tensor) -> Tensor:
        """Input indices (B, C, H, W) -> outputs (B, N, H', W') by looking up products."""
        (top, side), zero = self.padding, float(self.input_book.abs().argmin())
        padded = F.pad(a.float(), (side, side, top, top), value=zero)
        patches = F.unfold(padded, self.kernel_size, self.dilation, 0, self.stride).long()  # (B, C kh kw, places)
        rows = patches.transpose(1, 2).flatten(0, 1).unflatten(1, (self.groups, -1))
        codes = self.indices().unflatten(0, (self.groups, -1))
        y = torch.cat([self._add_up(rows[:, g], codes[g]) for g in range(self.groups)], 1)
        if self.bias is not None:
            y = y + self.bias
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        height, width = ((size - r - 1) // s + 1 for size, r, s in zip(padded.shape[2:], reach, self.stride))
        return y.view(len(a), height, width, -1).permute(0, 3, 1, 2)


def table_layer(layer: nn.Module, weight_book: Tensor, input_book: Tensor) -> TableLinear | TableConv2d:
    """The layer of indices that takes the place of a Linear or Conv2d; the entry of inputs nearest to 0 becomes 0."""
    sizes: dict[str, Any] = {"weights": len(weight_book), "inputs": len(input_book), "bias": layer.bias is not None}
    new: TableLinear | TableConv2d
    if isinstance(layer, nn.Conv2d):
        shape: tuple[Any, ...] = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = TableConv2d(layer.in_channels, layer.out_channels, *shape, groups=layer.groups, **sizes)
    else:
        assert isinstance(layer, nn.Linear)
        new = TableLinear(layer.in_features, layer.out_features, **sizes)
    new.set_(layer.get_parameter("weight"), weight_book, with_zero(input_book), layer.bias)
    return new


@torch.no_grad()
def sampled_inputs(
    model: nn.Module, workload: Workload, names: Sequence[str], batches: Sequence[Batch], samples: int
) -> dict[str, Tensor]:
    """Name -> about `samples` values that reach a layer, evenly taken from every batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    share = max(1, samples // max(1, len(batches)))

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        flat = x.float().flatten()
        found[name].append(flat[torch.linspace(0, len(flat) - 1, min(share, len(flat))).round().long()])

    with evaluating(model), watching(model, names, see):
        for batch in batches:
            workload.forward(model, batch)
    unseen = [name for name, parts in found.items() if not parts]
    if unseen:
        raise UserError(f"nothing reached {unseen[0]!r} on the calibration data; leave it out or give other data")
    return {name: torch.cat(parts) for name, parts in found.items()}


# --- the method ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupTables(Method):
    """Cluster the weights and the inputs of each layer; both become indices into a table of products."""

    weights: int = knob(32, choices=ENTRIES, per_layer=True, help="entries of a layer's codebook of weights")
    inputs: int = knob(32, choices=ENTRIES, per_layer=True, help="entries of a layer's codebook of inputs")
    samples: int = knob(65_536, low=64, high=10**7, log=True, help="values of each layer's input to cluster")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="size only",
    )
    paper: ClassVar[str] = "rapidnn"

    def targets(self, model: nn.Module) -> Iterator[str]:
        plan = anatomy(model)
        for name in codable(model):
            padding = getattr(model.get_submodule(name), "padding", 0)
            if name and not isinstance(padding, str) and not (plan.tied and name == plan.head):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        workload = need_workload(workload, self.name(), "to cluster the inputs of every layer")
        seen = sampled_inputs(model, workload, list(layers), workload.calibration, self.samples)
        for name, settings in layers.items():
            layer = model.get_submodule(name)
            books = kmeans(layer.get_parameter("weight"), settings.weights), kmeans(seen[name], settings.inputs)
            set_module(model, name, table_layer(layer, *books))
        return model
