"""What the compiler knows of layers: integer weights, and how real inputs become codes that stand for integers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.quantize.binary import PackedBinaryConv2d, PackedBinaryLinear
from lilliput.methods.quantize.lookup_tables import TableConv2d, TableLinear

MULTIPLIES = (PackedBinaryLinear, PackedBinaryConv2d, TableLinear, TableConv2d)
EVEN = 1e-3  # of the spacing: how far evenly spaced entries may be from multiples of it
WAYS = "quantize.binary(ends=True) or quantize.lookup_tables"


@dataclass(frozen=True, eq=False)
class Coder:
    """Real inputs x become codes: `codes` of the number of `breaks` that x - shift has reached."""

    breaks: Tensor  # float64 (J,), ascending
    codes: Tensor  # int64 (J + 1,)
    values: Tensor  # int64 (A,): what each code stands for, in units
    unit: float
    planes: tuple[int, ...] = ()  # see Product
    shift: Tensor | None = None  # float64, one for each input channel
    strict: bool = False  # a break itself still belongs below
    even: bool = False  # the values follow one another


@dataclass(frozen=True, eq=False)
class Layer:
    """One product as integers, and what they stand for: y = unit_n coder.unit S_n + bias_n."""

    name: str
    weights: Tensor  # int64 (N, C, height, width) of a convolution, (N, K) of a linear layer
    unit: Tensor  # float64 (N,)
    bias: Tensor  # float64 (N,)
    coder: Coder | None  # None takes real inputs
    stride: int = 1
    padding: int = 0


def read_layer(name: str, module: nn.Module, bits: int) -> Layer:
    """The integers of a layer; values that are not signs are rounded to `bits` bits. Raises UserError."""
    stride, padding = _places(name, module)
    if isinstance(module, PackedBinaryLinear | PackedBinaryConv2d):
        weights, unit, coder = _binary(name, module, bits)
    else:
        assert isinstance(module, TableLinear | TableConv2d)
        weights, unit, coder = _tables(module, bits)
    if isinstance(module, PackedBinaryConv2d | TableConv2d):
        weights = weights.view(len(weights), module.in_channels, *module.kernel_size)
    bias = torch.zeros(len(weights)) if module.bias is None else module.bias
    return Layer(name, weights, unit.double(), bias.detach().double(), coder, stride, padding)


def _places(name: str, module: nn.Module) -> tuple[int, int]:
    """Stride and padding of a convolution whose both axes are alike."""
    if not isinstance(module, PackedBinaryConv2d | TableConv2d):
        return 1, 0
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if module.groups != 1 or tuple(dilation) != (1, 1) or stride[0] != stride[1] or padding[0] != padding[1]:
        raise UserError(
            f"{name!r} is a convolution with groups {module.groups}, stride {tuple(stride)}, padding {tuple(padding)} "
            f"and dilation {tuple(dilation)}; circuits have one group, no dilation, and both axes alike"
        )
    return int(stride[0]), int(padding[0])


def _binary(
    name: str, module: PackedBinaryLinear | PackedBinaryConv2d, bits: int
) -> tuple[Tensor, Tensor, Coder | None]:
    if module.by_mean:
        raise UserError(f"{name!r} multiplies with the mean of its input; train it with another scale than 'alpha_K'")
    weights = module.signs().transpose(1, 2).flatten(1).long()  # (N, C kh kw)
    coder = None if module.levels is None else sign_coder(module.levels, module.shift, bits)
    return weights, module.scale.detach(), coder


def _tables(module: TableLinear | TableConv2d, bits: int) -> tuple[Tensor, Tensor, Coder]:
    book, unit = fixed_point(module.weight_book.double(), bits)
    return book[module.indices().long()], torch.full((module.rows,), unit), book_coder(module.input_book, bits)


def fixed_point(book: Tensor, bits: int) -> tuple[Tensor, float]:
    """Integers of `bits` bits and the unit in which they are the entries, as nearly as they can."""
    unit = max(float(book.abs().max()), 1e-30) / (2 ** (bits - 1) - 1)
    return (book / unit).round().long(), unit


def sign_coder(levels: Tensor, shift: Tensor | None, bits: int) -> Coder:
    """Residual signs: the bits of a code are the signs, the first one highest; it stands for sum_m +-g_m."""
    g = levels.detach().double().abs()
    whole, unit = (torch.ones(1).long(), float(g[0])) if len(g) == 1 else fixed_point(g, bits)
    breaks = torch.tensor(sorted({float(b) for m in range(len(g)) for b in _sums(g[:m])}), dtype=torch.float64)
    inside = torch.cat([breaks[:1] - 1, (breaks[1:] + breaks[:-1]) / 2, breaks[-1:] + 1])
    values = torch.stack(_sums(whole))
    shift = None if shift is None else shift.detach().double()
    return Coder(breaks, _signs(inside, g), values, unit, tuple(whole.tolist()), shift)


def _sums(g: Tensor) -> list[Tensor]:
    """sum_m +-g_m for every choice of signs, counted up in binary, minus as 0 and the first sign as the highest bit."""
    signs = itertools.product((-1, 1), repeat=len(g))
    return [(g * torch.tensor(s).to(g.dtype)).sum() if s else g.new_zeros(()) for s in signs]


def _signs(x: Tensor, g: Tensor) -> Tensor:
    """The residual signs of each x as the bits of an integer."""
    code = torch.zeros(len(x), dtype=torch.int64)
    for level in g:
        positive = x >= 0
        code, x = 2 * code + positive, x - torch.where(positive, level, -level)
    return code


def book_coder(book: Tensor, bits: int) -> Coder:
    """The nearest entry of a sorted book; evenly spaced entries count in their spacing, others in fixed point."""
    book = book.detach().double()
    spacing = float(book[-1] - book[0]) / (len(book) - 1)
    whole, unit = fixed_point(book, bits)
    even = spacing > 0 and bool(((book / spacing - (book / spacing).round()).abs() < EVEN).all())
    if even:
        whole, unit = (book / spacing).round().long(), spacing
    order = torch.arange(len(book))
    return Coder((book[1:] + book[:-1]) / 2, order, whole, unit, strict=True, even=even)
