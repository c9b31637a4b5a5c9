"""What both parties know of a binary network: the shapes of its layers and how its inputs come."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lilliput.errors import UserError

MOST_PRODUCTS = 2**25  # of a layer; one gate each at least


@dataclass(frozen=True)
class LayerShape:
    """A convolution of signs, its max-pooling, and which of pooling and normalisation comes first.

    A linear layer is a convolution whose kernel is the whole picture. `inputs` are (channels, height, width).
    """

    inputs: tuple[int, int, int]
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    pool: tuple[int, int] = (1, 1)  # size and stride of the squares that are pooled
    pool_first: bool = False

    @property
    def taps(self) -> int:
        """Weights of a filter."""
        return self.inputs[0] * self.kernel[0] * self.kernel[1]

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the outputs before pooling."""
        axes = zip(self.inputs[1:], self.kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)  # type: ignore[return-value]

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of the outputs."""
        size, stride = self.pool
        return tuple((n - size) // stride + 1 for n in self.picture)  # type: ignore[return-value]

    def places(self) -> np.ndarray:
        """Index of the input under each tap at each place, (places, taps), int32; -1 outside the picture."""
        channels, height, width = self.inputs
        tops, lefts = (np.arange(n) * s - p for n, s, p in zip(self.picture, self.stride, self.padding))
        downs, rights = (np.arange(k) * d for k, d in zip(self.kernel, self.dilation))
        y = (tops[:, None] + downs)[:, None, None, :, None]
        x = (lefts[:, None] + rights)[None, :, None, None, :]
        channel = np.arange(channels).reshape(1, 1, -1, 1, 1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return np.where(inside, (channel * height + y) * width + x, -1).reshape(-1, self.taps).astype(np.int32)

    def windows(self) -> np.ndarray:
        """Index of the places that are pooled together, (size^2, pooled places)."""
        size, stride = self.pool
        width = self.picture[1]
        rows, columns = (np.arange(n) * stride for n in self.pooled)
        corners = (rows[:, None] * width + columns).reshape(-1)
        offsets = (np.arange(size)[:, None] * width + np.arange(size)).reshape(-1)
        return offsets[:, None] + corners

    def check(self) -> None:
        """Raise UserError unless the sizes make a layer of a size that is bearable."""
        lengths, sizes = {"inputs": 3, "filters": 1}, asdict(self)
        if type(sizes.pop("pool_first")) is not bool:
            raise UserError(f"pool_first of a layer is {self.pool_first!r}; give True or False")
        for name, value in sizes.items():
            numbers, low = value if isinstance(value, tuple) else (value,), 0 if name == "padding" else 1
            if len(numbers) != lengths.get(name, 2) or not all(type(n) is int and low <= n < 2**16 for n in numbers):
                raise UserError(f"{name} of a layer is {value!r}; give {lengths.get(name, 2)} whole numbers from {low}")
        if min(*self.picture, *self.pooled) < 1:
            raise UserError(f"kernel {self.kernel} or pooling {self.pool} is larger than the picture {self.inputs}")
        if self.taps * self.filters * self.picture[0] * self.picture[1] > MOST_PRODUCTS:
            raise UserError(f"a layer of {self.filters} filters on {self.inputs} is too large for a circuit")


@dataclass(frozen=True)
class Shape:
    """All layers, the last one giving a score for each class; inputs are signs, or whole numbers of `bits` bits."""

    layers: tuple[LayerShape, ...]
    bits: int = 0

    @property
    def inputs(self) -> int:
        """Values of an input."""
        return int(np.prod(self.layers[0].inputs))

    @property
    def share_bits(self) -> int:
        """Bits of the two shares of a first product of whole numbers, less a threshold."""
        return (2 * self.largest_sum + 1).bit_length() + 1

    @property
    def largest_sum(self) -> int:
        """Of a first product of whole numbers."""
        return self.layers[0].taps * (2**self.bits - 1)

    def check(self) -> None:
        """Raise UserError unless the layers fit together."""
        if not self.layers or type(self.bits) is not int or not 0 <= self.bits <= 16:
            raise UserError(f"{len(self.layers)} layers on inputs of {self.bits!r} bits; give a layer and 0 to 16 bits")
        for layer in self.layers:
            layer.check()
        for before, after in zip(self.layers, self.layers[1:]):
            given, taken = (before.filters, *before.pooled), after.inputs
            if given != taken:
                raise UserError(f"a layer gives {given} and the next takes {taken}")
        last = self.layers[-1]
        linear = last.kernel == last.inputs[1:] and last.padding == (0, 0) and last.pooled == (1, 1)
        if not linear or last.filters < 2 or (len(self.layers) == 1 and self.bits):
            raise UserError("the last layer must be a linear one of signs, with at least two classes")
        if self.bits and self.share_bits > 32:
            raise UserError(f"sums of {self.layers[0].taps} numbers of {self.bits} bits do not fit into 32 bits")

    def to_json(self) -> bytes:
        """The same as text."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Shape:
        """What `to_json` wrote. Raises UserError for anything else."""
        try:
            found = json.loads(text)
            layers = tuple(LayerShape(**{k: _frozen(v) for k, v in layer.items()}) for layer in found["layers"])
            shape = cls(layers, found["bits"])
            shape.check()
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"the network's shape cannot be read: {error}") from None
        return shape


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
