"""Binary layers as they are saved and run: one bit for a weight, products by the kernels of `binary_linear`.

Where activations stay real, a linear layer multiplies with the packed bits; a convolution unpacks them for each call,
so there it is size only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels import binary_conv2d as conv_kernel
from lilliput.kernels import binary_linear as kernel
from lilliput.kernels.binary_linear import along
from lilliput.methods.quantize._binary import BinaryConv2d, BinaryLinear, pair, residual_sign


class _PackedBinary(nn.Module):
    """Signs of weights in the layout of the kernels, a scale for each row, and how inputs become signs."""

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    shift: Tensor | None
    bias: Tensor | None
    inputs_dim = -1

    def _set_up(self, rows: int, segments: int, inputs: int, levels: int, shift: bool, by_mean: bool, bias: bool):
        if not 0 <= levels <= kernel.PLANES:
            raise UserError(f"levels is {levels}; give 1 to {kernel.PLANES}, or 0 for real activations")
        self.shape = rows, segments, inputs
        self.by_mean = by_mean
        size = kernel.layout_size(rows, segments, inputs)
        blocks = -(-rows // 16)
        self.register_buffer("codes", torch.zeros(blocks, size // max(1, blocks), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(rows))
        self.register_buffer("levels", torch.ones(levels) if levels else None)
        self.register_buffer("shift", torch.zeros(inputs) if shift else None)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)

    @torch.no_grad()
    def _take(self, layer: BinaryLinear | BinaryConv2d, positive: Tensor) -> None:
        self.codes = kernel.pack(positive)
        self.scale = layer.row_scale().detach().float().clone()
        if layer.levels is not None:
            self.levels = layer.levels.detach().abs().float().clone()
        for name in ("shift", "bias"):
            value = getattr(layer, name)
            if value is not None:
                setattr(self, name, value.detach().float().clone())

    @property
    def compute_dtype(self) -> str:
        """Of the arithmetic, for the roofline."""
        return "fp32" if self.levels is None else "binary"

    @property
    def weight_bytes(self) -> int:
        """Bytes that one product reads."""
        return self.codes.nbytes + self.scale.nbytes

    def signs(self) -> Tensor:
        """+1 and -1, float32 (rows, segments, inputs)."""
        return kernel.unpack(self.codes, *self.shape)

    def dequantized(self) -> Tensor:
        """The weights that these bits stand for, float32, in the shape of the float layer."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """The layer without its bias, by the kernel."""
        raise NotImplementedError

    def simulated(self, x: Tensor) -> Tensor:
        """What `product` gives, in torch's float arithmetic and with the gradients of the training layer."""
        raise NotImplementedError

    def binary_input(self, x: Tensor) -> Tensor:
        """Planes of signs with their coefficients added up, as the training layer has them."""
        if self.levels is None:
            return x
        moved = x if self.shift is None else x - along(self.shift, x, self.inputs_dim)
        return residual_sign(moved, self.levels)

    def _how(self) -> tuple[Tensor, Tensor | None]:
        """Coefficients and shift as the kernels take them; a model that was cast has them in another type."""
        assert self.levels is not None
        return self.levels.float(), None if self.shift is None else self.shift.float()

    def _run(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise UserError(f"the input of a binary layer is {x.dtype}; give float32 or bfloat16")
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self)  # type: ignore[return-value]
        return self.product(x.float()).to(x.dtype)


class _Differentiable(torch.autograd.Function):
    """The kernel's product with the training layer's gradient for its input."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: _PackedBinary) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.product(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().float().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(ctx.layer.simulated(x), x, slope.float())
        return found.to(slope.dtype), None


class PackedBinaryLinear(_PackedBinary):
    """y = k scale * x_b sign(W)^T + b from packed signs; `levels` 0 leaves x as it is."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        levels: int = 1,
        shift: bool = False,
        by_mean: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._set_up(out_features, 1, in_features, levels, shift, by_mean, bias)

    @classmethod
    def from_layer(cls, layer: BinaryLinear) -> PackedBinaryLinear:
        """The packed form of a training layer: the same outputs."""
        how = *_how(layer), layer.by_mean, layer.bias is not None
        packed = cls(layer.in_features, layer.out_features, *how)
        packed._take(layer, (layer.weight.detach() >= 0).unsqueeze(1))
        return packed

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "levels": 0 if self.levels is None else self.levels.numel(),
            "shift": self.shift is not None,
            "by_mean": self.by_mean,
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, levels={0 if self.levels is None else len(self.levels)}"

    def forward(self, x: Tensor) -> Tensor:
        y = self._run(x.reshape(math.prod(x.shape[:-1]), self.in_features))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        scale = self.scale.float()
        if self.levels is None:
            return kernel.binary_weight_linear(x, self.codes, scale)
        return kernel.binary_linear(x, self.codes, scale, *self._how(), self.by_mean)

    def dequantized(self) -> Tensor:
        return self.signs().squeeze(1) * self.scale.float().unsqueeze(1)

    def simulated(self, x: Tensor) -> Tensor:
        y = F.linear(self.binary_input(x), self.dequantized())
        moved = x if self.shift is None else x - self.shift
        return y * moved.abs().mean(-1, keepdim=True) if self.by_mean else y


class PackedBinaryConv2d(_PackedBinary):
    """A zero-padded convolution from packed signs; `levels` 0 leaves x as it is and unpacks the weights each time."""

    inputs_dim = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        levels: int = 1,
        shift: bool = False,
        by_mean: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self._set_up(out_channels, math.prod(self.kernel_size), in_channels, levels, shift, by_mean, bias)

    @classmethod
    def from_layer(cls, layer: BinaryConv2d) -> PackedBinaryConv2d:
        """The packed form of a training layer: the same outputs."""
        sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        how = *_how(layer), layer.by_mean, layer.bias is not None
        packed = cls(layer.in_channels, layer.out_channels, *sizes, *how)
        packed._take(layer, (layer.weight.detach() >= 0).flatten(2).transpose(1, 2))
        return packed

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "levels": 0 if self.levels is None else self.levels.numel(),
            "shift": self.shift is not None,
            "by_mean": self.by_mean,
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, levels={0 if self.levels is None else len(self.levels)}"

    def forward(self, x: Tensor) -> Tensor:
        y = self._run(x)
        return y if self.bias is None else y + along(self.bias.to(y.dtype), y, 1)

    def product(self, x: Tensor) -> Tensor:
        if self.levels is None:
            y = F.conv2d(x, self._filters(), None, self.stride, self.padding, self.dilation)
            return y * along(self.scale.float(), y, 1)
        levels, shift = self._how()
        weights = self.codes, self.scale.float(), levels, self.kernel_size, shift, self.by_mean
        return conv_kernel.binary_conv2d(x, *weights, self.stride, self.padding, self.dilation)

    def dequantized(self) -> Tensor:
        return self._filters() * self.scale.float().view(-1, 1, 1, 1)

    def _filters(self) -> Tensor:
        """Signs (out, in, height, width)."""
        return self.signs().transpose(1, 2).unflatten(2, self.kernel_size)

    def simulated(self, x: Tensor) -> Tensor:
        places = self.stride, self.padding, self.dilation
        y = F.conv2d(self.binary_input(x), self.dequantized(), None, *places)
        return y * conv_kernel.box_mean(x, self.shift, self.kernel_size, *places) if self.by_mean else y


def _how(layer: BinaryLinear | BinaryConv2d) -> tuple[int, bool]:
    return 0 if layer.levels is None else layer.levels.numel(), layer.shift is not None
