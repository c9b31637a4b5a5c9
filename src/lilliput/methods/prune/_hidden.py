"""Layers of random weights of which some are kept, chosen by scores while they train, by one stored bit afterwards.

    W = gain * sign * kept      sign from a seed, gain = sqrt(2 / (inputs * share that is kept))

The signs come from SplitMix64, which gives the same numbers on every machine and with every version of torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.quantize._packed import pack_codes, unpack_codes

STEP, FIRST, SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SHIFTS = tuple(map(np.uint64, (30, 27, 31)))


def split_mix(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers of SplitMix64 (Steele, Lea and Flood, 2014) from a seed, uint64."""
    z = np.arange(1, count + 1, dtype=np.uint64) * STEP + np.uint64(seed)
    z = (z ^ (z >> SHIFTS[0])) * FIRST
    z = (z ^ (z >> SHIFTS[1])) * SECOND
    return z ^ (z >> SHIFTS[2])


def random_signs(seed: int, shape: tuple[int, ...]) -> Tensor:
    """+1 and -1, float32, each of them one bit of SplitMix64."""
    count = math.prod(shape)
    words = split_mix(seed, math.ceil(count / 64)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(words, count=count, bitorder="little").astype(np.float32)
    return torch.from_numpy(bits * 2 - 1).view(shape)


class _Top(torch.autograd.Function):
    """1 at the `count` largest of x, 0 elsewhere; the gradient passes straight to all of x."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> Tensor:  # type: ignore[override]
        kept = torch.zeros_like(x).flatten()
        kept[x.flatten().topk(count).indices] = 1
        return kept.view_as(x)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope, None


class _Hidden(nn.Module):
    """The weights of a layer: a seed, and which of them are kept; `scores` only while that is being learned."""

    compute_dtype = "fp32"
    codes: Tensor  # (rows, bytes of a row), one bit per weight
    scores: nn.Parameter | None

    def _set_up(self, shape: tuple[int, ...], kept: float, seed: int) -> None:
        if not 0 < kept <= 1 or not 0 <= seed < 2**31:
            raise UserError(f"kept is {kept} and seed {seed}; give a share above 0 up to 1, and a seed below {2**31}")
        self.shape, self.kept, self.seed = shape, kept, seed
        self.register_buffer("codes", torch.zeros(shape[0], math.ceil(math.prod(shape[1:]) / 8), dtype=torch.uint8))
        self.register_buffer("bias", None)
        self.register_parameter("scores", None)

    @property
    def count(self) -> int:
        """Weights that are kept."""
        return max(1, round(self.kept * math.prod(self.shape)))

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk."""
        return self.codes.nbytes

    def learn_(self) -> None:
        """Begin to learn which weights are kept: scores as torch starts the weights of such a layer."""
        bound = math.prod(self.shape[1:]) ** -0.5
        generator = torch.Generator().manual_seed(self.seed)
        self.scores = nn.Parameter(torch.empty(self.shape).uniform_(-bound, bound, generator=generator))

    def settle_(self) -> None:
        """Keep what the scores chose, without them."""
        self.codes = pack_codes(self.choice().detach().flatten(1), 1)
        self.scores = None

    def choice(self) -> Tensor:
        """1 where a weight is kept, else 0, in the shape of the weights; a gradient passes straight to the scores."""
        if self.scores is not None:
            return _Top.apply(self.scores.abs(), self.count)  # type: ignore[return-value]
        return unpack_codes(self.codes, 1, math.prod(self.shape[1:])).float().view(self.shape)

    def dequantized(self) -> Tensor:
        """The weights, float32."""
        gain = (2 / (math.prod(self.shape[1:]) * self.kept)) ** 0.5
        return random_signs(self.seed, self.shape) * self.choice() * gain


class HiddenLinear(_Hidden):
    """y = x W^T with W (out_features, in_features) random and partly kept."""

    def __init__(self, in_features: int, out_features: int, kept: float = 0.5, seed: int = 0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._set_up((out_features, in_features), kept, seed)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"kept": self.kept, "seed": self.seed}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kept={self.kept}, seed={self.seed}"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype))


class HiddenConv2d(_Hidden):
    """A zero-padded convolution without a bias whose weights are random and partly kept."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        kept: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self._set_up((out_channels, in_channels // groups, *kernel_size), kept, seed)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "kept")
        config = {name: getattr(self, name) for name in (*names, "seed")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, kept={self.kept}, seed={self.seed}"

    def forward(self, x: Tensor) -> Tensor:
        w = self.dequantized().to(x.dtype)
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)


def has_hidden_form(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, or a convolution with zero padding given in pixels."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def hidden_layer(layer: nn.Module, kept: float, seed: int) -> HiddenLinear | HiddenConv2d:
    """A random layer of the sizes of an ordinary one, whose weights and bias are dropped; it is ready to learn."""
    new: HiddenLinear | HiddenConv2d
    if isinstance(layer, nn.Linear):
        new = HiddenLinear(layer.in_features, layer.out_features, kept, seed)
    else:
        assert isinstance(layer, nn.Conv2d)
        sizes: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        new = HiddenConv2d(layer.in_channels, layer.out_channels, *sizes, layer.groups, kept, seed)
    new.learn_()
    return new
