"""A 2-D convolution whose weights are signs with a scale per filter, on activations that become signs.

The product is that of `binary_linear` with the taps of the filter as its segments; pixels are packed once, channels
side by side. Places outside the picture are neither +1 nor -1: they count nothing, as with zero padding.
With `by_mean` (XNOR-Net's K) an output position is multiplied with the mean over the taps under the filter of
mean_c |x - shift|, where outside places are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels.binary_linear import along, check_codes, check_grid, planes

LIMIT = 2**24  # of a size, stride, padding or dilation
Pair = Sequence[int]


def box_mean(x: Tensor, shift: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """K (B, 1, H', W') of x (B, C, H, W): the mean under the filter of the mean over channels of |x - shift|."""
    moved = x if shift is None else x - along(shift, x, 1)
    box = torch.full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=x.dtype)
    return F.conv2d(moved.abs().mean(1, keepdim=True), box, None, tuple(stride), tuple(padding), tuple(dilation))


def reference(
    x: Tensor,
    signs: Tensor,
    scale: Tensor,
    levels: Tensor,
    shift: Tensor | None = None,
    by_mean: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """x (B, C, H, W), signs (N, C, h, w) of +1 and -1 -> y (B, N, H', W'), float64."""
    _, binary = planes(x.float(), levels.float(), shift, 1)
    place = tuple(stride), tuple(padding), tuple(dilation)
    y = F.conv2d(binary.double(), signs.double(), None, *place) * along(scale.double(), x, 1)
    return y * box_mean(x.double(), shift, signs.shape[2:], *place) if by_mean else y


def binary_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    kernel: Pair,
    shift: Tensor | None = None,
    by_mean: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """x (B, C, H, W) float32 and codes of `binary_linear.pack` of (N, h * w, C) -> y (B, N, H', W'), float32.

    y has the memory format of x (channels last, or else contiguous). Raises UserError when sizes do not fit.
    """
    return torch.ops.lilliput.binary_conv2d(x, codes, scale, levels, shift, by_mean, kernel, stride, padding, dilation)


def _binary_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    shift: Tensor | None,
    by_mean: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    y = _fake(x, codes, scale, levels, shift, by_mean, kernel, stride, padding, dilation)
    check_codes(codes, scale.numel(), kernel[0] * kernel[1], x.shape[1])
    check_grid(scale, levels, shift, x.shape[1])
    last = _channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    scale, levels = scale.contiguous(), levels.contiguous()
    how = levels.data_ptr(), levels.numel(), 0 if shift is None else shift.data_ptr(), by_mean
    weights = codes.data_ptr(), scale.data_ptr(), scale.numel()
    places = kernel, stride, padding, dilation
    threads = torch.get_num_threads()
    _native.binary_conv2d(x.data_ptr(), list(x.shape), last, *weights, *how, *places, y.data_ptr(), threads)
    return y


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _fake(x, codes, scale, levels, shift, by_mean, kernel, stride, padding, dilation) -> Tensor:
    if x.dtype != torch.float32 or x.ndim != 4:
        raise UserError(f"x is {x.dtype} with shape {tuple(x.shape)}; binary_conv2d takes (B, C, H, W) in float32")
    _check_places(kernel, stride, padding, dilation)
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if min(size) < 1:
        raise UserError(f"a filter of {kernel} with dilation {dilation} does not fit into {tuple(x.shape[2:])} pixels")
    y = x.new_empty(x.shape[0], scale.shape[0], *size)
    return y.to(memory_format=torch.channels_last) if _channels_last(x) else y


def _check_places(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    named = (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, values, least in named:
        if len(values) != 2 or not all(least <= value < LIMIT for value in values):
            raise UserError(f"{name} is {tuple(values)}; give two numbers from {least} to {LIMIT - 1}")


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define(
    "binary_conv2d(Tensor x, Tensor codes, Tensor scale, Tensor levels, Tensor? shift, bool by_mean, int[] kernel, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor"
)
_library.impl("binary_conv2d", _binary_conv2d, "CPU")
torch.library.register_fake("lilliput::binary_conv2d", _fake, lib=_library)
