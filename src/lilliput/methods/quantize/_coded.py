"""Layers whose weights are stored as packed codes of 2 to 8 bits times a scale and computed in float: size only."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.quantize._packed import pack_codes, unpack_codes


class _Coded(nn.Module):
    """Codes, one scale per output row, and a bias."""

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int, bias: bool):
        super().__init__()
        if not 2 <= bits <= 8:
            raise UserError(f"bits is {bits}; give 2 to 8")
        self.shape, self.bits = tuple(shape), bits
        self.columns = math.prod(shape[1:])
        width = self.columns if bits == 8 else math.ceil(self.columns / 8) * bits
        dtype = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(shape[0], width, dtype=dtype))
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)

    def set_(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Take codes (any shape with N rows, below 2**(bits - 1) in size), scale (N,) or (1,) and bias (N,)."""
        flat = codes.detach().reshape(self.shape[0], self.columns)
        self.codes = flat.to(torch.int8) if self.bits == 8 else pack_codes(flat.int() + 2 ** (self.bits - 1), self.bits)
        self.scale = scale.detach().float().reshape(-1).expand(self.shape[0]).clone()
        if bias is not None:
            self.bias = bias.detach().float().clone()

    def dequantized(self) -> Tensor:
        """The weights these codes stand for, float32."""
        codes = self.codes
        if self.bits < 8:
            codes = unpack_codes(codes, self.bits, self.columns) - 2 ** (self.bits - 1)
        return (codes.float() * self.scale.unsqueeze(1)).view(self.shape)

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk."""
        return self.codes.numel() + 4 * self.shape[0]


class CodedLinear(_Coded):
    """y = x W^T + b with W (out_features, in_features) stored as codes."""

    def __init__(self, in_features: int, out_features: int, bits: int = 8, bias: bool = True):
        super().__init__((out_features, in_features), bits, bias)
        self.in_features, self.out_features = in_features, out_features

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized().to(x.dtype), bias)


class CodedConv2d(_Coded):
    """A zero-padded 2-D convolution whose weights are stored as codes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bits: int = 8,
        bias: bool = True,
    ):
        super().__init__((out_channels, in_channels // groups, *kernel_size), bits, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bits": self.bits,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.dequantized().to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def codable(model: nn.Module) -> list[str]:
    """Names of the plain Linear and zero-padded Conv2d layers, in the order of the model."""
    return [
        n
        for n, m in model.named_modules()
        if type(m) is nn.Linear or (type(m) is nn.Conv2d and m.padding_mode == "zeros")
    ]


def coded(
    layer: nn.Module,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> CodedLinear | CodedConv2d:
    """The coded module that takes the place of a Linear or Conv2d."""
    how = (bits, bias is not None)
    new: CodedLinear | CodedConv2d
    if isinstance(layer, nn.Linear):
        new = CodedLinear(layer.in_features, layer.out_features, *how)
    elif isinstance(layer, nn.Conv2d):
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = CodedConv2d(layer.in_channels, layer.out_channels, *shape, layer.groups, *how)  # type: ignore[arg-type]
    else:
        raise UserError(f"a {type(layer).__name__} cannot be stored as codes; only Linear and Conv2d can")
    new.set_(codes, scale, bias)
    return new
