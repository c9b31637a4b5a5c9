"""Binary layers as they train: latent float weights whose signs multiply, gradients straight through the signs.

Papers: Courbariaux, Bengio & David, "BinaryConnect", 2015 (arXiv 1511.00363); Rastegari et al., "XNOR-Net", 2016 (arXiv
1603.05279); Ghasemzadeh, Samragh & Koushanfar, "ReBNet", 2017 (arXiv 1711.01243).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels.binary_conv2d import box_mean
from lilliput.kernels.binary_linear import PLANES, along
from lilliput.training import Callback, State

ACTIVATIONS = ("sign", "real")
SCALES = ("alpha", "alpha_K", "layer", "none")


class _Sign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient passes where |x| <= 1, as that of clip(x, -1, 1)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return slope * (x.abs() <= 1)


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1 (also for NaN), with the straight-through gradient."""
    return _Sign.apply(x)  # type: ignore[return-value]


def residual_sign(x: Tensor, levels: Tensor) -> Tensor:
    """sum_m level_m b_m with r_0 = x, b_m = sign(r_m), r_m+1 = r_m - level_m b_m; one level of 1 is the plain sign."""
    total = torch.zeros_like(x)
    r = x
    for level in levels:
        plane = level * sign(r)
        total, r = total + plane, r - plane
    return total


def first_levels(count: int) -> Tensor:
    """Coefficients that fall evenly and sum to one: 1; 2/3 1/3; 3/6 2/6 1/6 (ReBNet's start)."""
    values = torch.arange(count, 0, -1).float()
    return values / values.sum()


class _Binary(nn.Module):
    """What linear layers and convolutions share: latent weights, scale, and how inputs become signs."""

    inputs_dim = -1  # where the inputs (channels) lie in x
    weight: nn.Parameter
    levels: nn.Parameter | None
    shift: nn.Parameter | None
    gamma: nn.Parameter | None

    def _set_up(self, inputs: int, activations: str, levels: int, scale: str, shift: bool) -> None:
        if activations not in ACTIVATIONS or scale not in SCALES or not 1 <= levels <= PLANES:
            raise UserError(
                f"activations {activations!r}, scale {scale!r}, levels {levels}: choose one of "
                f"{', '.join(ACTIVATIONS)}, one of {', '.join(SCALES)}, and 1 to {PLANES}"
            )
        signs = activations == "sign"
        if scale == "alpha_K" and not (signs and levels == 1):
            raise UserError("scale 'alpha_K' is for one level of signs: K is the size of what the sign drops")
        self.activations, self.scale = activations, scale
        # A single coefficient is a factor of the whole layer, which the scale is already.
        self.levels = nn.Parameter(first_levels(levels), requires_grad=levels > 1) if signs else None
        self.shift = nn.Parameter(torch.zeros(inputs)) if signs and shift else None
        self.gamma = nn.Parameter(self.weight.detach().abs().mean()) if scale == "layer" else None

    @property
    def by_mean(self) -> bool:
        """Whether outputs are multiplied with K, the mean size of the inputs under them."""
        return self.scale == "alpha_K"

    def row_scale(self) -> Tensor:
        """A factor for each output: mean |w| of its row (alpha), one learned for all (layer), or 1."""
        if self.gamma is not None:
            return self.gamma.abs().expand(len(self.weight))
        if self.scale == "none":
            return self.weight.new_ones(len(self.weight))
        return self.weight.abs().flatten(1).mean(1)

    def binary_weight(self) -> Tensor:
        """scale * sign(w), of the shape of w."""
        return along(self.row_scale(), self.weight, 0) * sign(self.weight)

    def binary_input(self, x: Tensor) -> Tensor:
        """The planes of signs of x - shift with their coefficients added up, or x where activations are real."""
        if self.levels is None:
            return x
        moved = x if self.shift is None else x - along(self.shift, x, self.inputs_dim)
        # ReBNet keeps coefficients positive
        return residual_sign(moved, self.levels.abs())


class BinaryLinear(_Binary):
    """y = scale * x_b sign(W)^T * K + b; x_b is x itself, its sign, or its residual signs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activations: str = "sign",
        levels: int = 1,
        scale: str = "alpha",
        shift: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._set_up(in_features, activations, levels, scale, shift)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activations={self.activations}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.binary_input(x), self.binary_weight())
        if self.by_mean:
            moved = x if self.shift is None else x - self.shift
            y = y * moved.abs().mean(-1, keepdim=True)
        return y if self.bias is None else y + self.bias


class BinaryConv2d(_Binary):
    """The same for a convolution; places outside the picture count as zero, neither +1 nor -1."""

    inputs_dim = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        activations: str = "sign",
        levels: int = 1,
        scale: str = "alpha",
        shift: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._set_up(in_channels, activations, levels, scale, shift)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, activations={self.activations}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        places = self.stride, self.padding, self.dilation
        y = F.conv2d(self.binary_input(x), self.binary_weight(), None, *places)
        if self.by_mean:
            y = y * box_mean(x, self.shift, self.kernel_size, *places)
        return y if self.bias is None else y + along(self.bias, y, 1)


def pair(value: Any) -> tuple[int, int]:
    """A size for both axes from one number or two."""
    first, second = value if isinstance(value, Iterable) else (value, value)
    return int(first), int(second)


def binary_copy(layer: nn.Linear | nn.Conv2d, **how: Any) -> BinaryLinear | BinaryConv2d:
    """A training layer that starts with the weights of a float one. Raises UserError for what has no binary form."""
    new: BinaryLinear | BinaryConv2d
    if isinstance(layer, nn.Linear):
        new = BinaryLinear(layer.in_features, layer.out_features, layer.bias is not None, **how)
    else:
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UserError("only convolutions with one group and zero padding given in pixels have a binary form")
        sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        new = BinaryConv2d(layer.in_channels, layer.out_channels, *sizes, layer.bias is not None, **how)  # type: ignore[arg-type]
    with torch.no_grad():
        new.weight.copy_(layer.weight)
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
        if new.gamma is not None:
            new.gamma.copy_(new.weight.abs().mean())
    return new


class KeepLatent(Callback):
    """After each update: latent weights within [-1, 1], where gradients pass, and around zero (XNOR-Net's code).

    `center` takes from each filter its mean over the input channels.
    """

    def __init__(self, center: bool = False):
        self.center = center

    @torch.no_grad()
    def on_step(self, state: State) -> None:
        for module in state.model.modules():
            if isinstance(module, _Binary):
                if self.center:
                    module.weight.sub_(module.weight.mean(1, keepdim=True))
                module.weight.clamp_(-1, 1)
