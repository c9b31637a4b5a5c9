"""A network in integers alone: what the circuit, the C++ and this reference compute, to the bit.

    S_n = sum_k w_nk v(a_k)      code = codes[number of thresholds of n that S_n has reached]

Inputs are bytes; between layers only codes travel, small unsigned numbers that stand for the values of a book. What
lies between two products (BatchNorm, ReLU, the next layer's rounding) is in the thresholds. Sums are exact in float64,
in which PyTorch computes them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 250  # frames in memory
Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True, eq=False)
class Grid:
    """Real inputs as bytes: x = offset + step q, q in 0..255."""

    step: float
    offset: float

    def read(self, x: Tensor) -> Tensor:
        """The nearest bytes, uint8 in the shape of x."""
        return ((x.double() - self.offset) / self.step).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Steps:
    """A function of integers that is constant but for some steps, one for each channel."""

    thresholds: Tensor  # int64 (N, J), ascending or equal along J where the channel rises
    falling: Tensor  # bool (N,): the value falls where the sum grows
    codes: Tensor  # int64 (J + 1,): what each number of steps gives

    @property
    def bits(self) -> int:
        """Of a code."""
        return max(1, int(self.codes.max()).bit_length())

    def __call__(self, sums: Tensor) -> Tensor:
        """Sums (B, N, ...) -> codes of the same shape."""
        s = sums.unsqueeze(2)
        shape = (1, *self.thresholds.shape, *[1] * (sums.ndim - 2))
        passed = (s >= self.thresholds.view(shape)) ^ self.falling.view(1, -1, *[1] * (s.ndim - 2))
        return self.codes[passed.sum(2)]


@dataclass(frozen=True, eq=False)
class Scale:
    """Codes of evenly spaced values: ((multiplier S + offset) >> shift), held within 0..2**bits - 1."""

    multiplier: Tensor  # int64 (N,)
    offset: Tensor  # int64 (N,)
    shift: int
    bits: int

    def __call__(self, sums: Tensor) -> Tensor:
        """Sums (B, N, ...) -> codes of the same shape."""
        shape = (1, -1, *[1] * (sums.ndim - 2))
        scaled = sums * self.multiplier.view(shape) + self.offset.view(shape)
        return (scaled >> self.shift).clamp(0, 2**self.bits - 1)


@dataclass(frozen=True, eq=False)
class Encode:
    """The bytes of the input as codes, by the same steps for all."""

    shape: Shape
    steps: Steps  # of one channel

    @property
    def out(self) -> Shape:
        """Shape of what comes out."""
        return self.shape

    def __call__(self, codes: Tensor) -> Tensor:
        """Bytes -> codes."""
        return self.steps(codes.reshape(len(codes), 1, -1)).view(codes.shape)


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution, or a linear layer as one whose window is the whole input; padding adds nothing to a sum."""

    shape: Shape
    weights: Tensor  # int64 (N, C, height, width of the window)
    values: Tensor  # int64 (A,): what each input code stands for
    planes: tuple[int, ...]  # coefficients of the signs that the bits of a code are, the highest bit first; or none
    stride: int
    padding: int
    encoder: Steps | Scale | None  # None for the last, which gives its sums

    @property
    def out(self) -> Shape:
        """Shape of what comes out."""
        (_, height, width), (n, _, kh, kw) = self.shape, self.weights.shape
        reach = 2 * self.padding
        return n, (height + reach - kh) // self.stride + 1, (width + reach - kw) // self.stride + 1

    @property
    def bits(self) -> int:
        """Of an input code."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def bound(self) -> int:
        """No sum, whole or partial, is larger."""
        return int(self.weights.abs().flatten(1).sum(1).max()) * int(self.values.abs().max())

    @property
    def signs(self) -> bool:
        """Whether every weight is +1 or -1."""
        return bool((self.weights.abs() == 1).all())

    @property
    def whole(self) -> bool:
        """Whether one window covers the whole input."""
        return self.shape[1:] == tuple(self.weights.shape[2:]) and self.padding == 0

    def sums(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) -> sums (B, N, H', W'), int64."""
        values = self.values[codes.long()].double()
        return F.conv2d(values, self.weights.double(), None, self.stride, self.padding).round().long()

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes -> codes, or sums for the last product."""
        sums = self.sums(codes)
        return sums if self.encoder is None else self.encoder(sums)


@dataclass(frozen=True, eq=False)
class Pool:
    """The largest code of each square of `size`; what does not fill a square is left out."""

    shape: Shape
    size: int
    bits: int

    @property
    def out(self) -> Shape:
        """Shape of what comes out."""
        return self.shape[0], self.shape[1] // self.size, self.shape[2] // self.size

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) -> codes (B, C, H / size, W / size)."""
        return F.max_pool2d(codes.double(), self.size).long()


@dataclass(frozen=True, eq=False)
class Scores:
    """What the sums of the last product say of each class: multiplier S + offset."""

    multiplier: Tensor  # int64 (N,)
    offset: Tensor  # int64 (N,)

    def __call__(self, sums: Tensor) -> Tensor:
        """Sums (B, N, 1, 1) -> scores (B, N)."""
        return sums.flatten(1) * self.multiplier + self.offset


Stage = Encode | Product | Pool


@dataclass(frozen=True, eq=False)
class IntegerNet:
    """Stages in the order they run, and how the last sums are read."""

    shape: Shape
    grid: Grid
    stages: tuple[Stage, ...]
    scores: Scores

    @property
    def products(self) -> list[Product]:
        """The stages that multiply."""
        return [stage for stage in self.stages if isinstance(stage, Product)]

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.scores.multiplier)

    @property
    def weight_bits(self) -> int:
        """Of all weights as the circuit stores them."""
        return sum(p.weights.numel() * max(1, (len(p.weights.unique()) - 1).bit_length()) for p in self.products)

    @property
    def activation_bits(self) -> int:
        """Of one input and of all codes between layers, each frame once."""
        first = self.shape[0] * self.shape[1] * self.shape[2] * 8
        maps = ((s.out, s.encoder.bits) for s in self.products if s.encoder is not None)
        return first + sum(c * h * w * bits for (c, h, w), bits in maps)

    def read(self, x: Tensor) -> Tensor:
        """Real inputs (B, ...) -> bytes (B, C, H, W)."""
        return self.grid.read(x).reshape(len(x), *self.shape)

    def __call__(self, q: Tensor) -> Tensor:
        """Bytes (B, C, H, W) -> scores (B, classes), int64."""
        return torch.cat([self._scores(part) for part in q.split(AT_ONCE)])

    def _scores(self, q: Tensor) -> Tensor:
        codes = q.long()
        for stage in self.stages:
            codes = stage(codes)
        return self.scores(codes)
