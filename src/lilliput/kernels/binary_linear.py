"""y = x W^T for weights that are signs with a scale per row, kept at one bit each; activations are signs, too, or real.

Activations become up to three planes of signs with a coefficient each, the residual binarisation of ReBNet (one plane
with coefficient 1 is XNOR-Net's sign):

    r_0 = x - shift,   b_m = +1 where r_m >= 0 else -1,   r_m+1 = r_m - level_m b_m
    y_n = k scale_n sum_m level_m (K - 2 popcount(w_n xor b_m)),   k = mean |x - shift| of the token, or 1

Packing the activations is part of the product. Zero and minus zero count as +1, NaN as -1 (it is not >= 0). Sums of
signs are exact integers, so a result depends on neither other tokens nor the number of threads. AVX-512 needs
VPOPCNTDQ; on machines without it the AVX2 loops run.

`binary_weight_linear` multiplies float32 activations with the packed signs; it sums in float32, input after input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native, isa

PLANES = 3  # at most
MOST_INPUTS = 2**30  # sums of signs are 32-bit integers


def planes(x: Tensor, levels: Tensor, shift: Tensor | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Signs (M, *x.shape) of x and sum_m level_m b_m, of the shape of x; `shift` lies along `dim`."""
    r = x if shift is None else x - along(shift, x, dim)
    signs, total = [], torch.zeros_like(r)
    for level in levels:
        sign = torch.where(r >= 0, 1.0, -1.0)
        r = r - level * sign
        signs.append(sign)
        total = total + level * sign
    return torch.stack(signs), total


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Values (C,) in the shape that broadcasts over x along `dim`."""
    return values.view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])


def reference(
    x: Tensor, signs: Tensor, scale: Tensor, levels: Tensor, shift: Tensor | None = None, by_mean: bool = False
) -> Tensor:
    """x (M, K), signs (N, K) of +1 and -1, scale (N,), levels (M,), shift (K,) -> y (M, N), float64."""
    _, binary = planes(x.float(), levels.float(), shift)
    y = binary.double() @ signs.double().T * scale.double()
    moved = x if shift is None else x - shift
    return y * moved.double().abs().mean(-1, keepdim=True) if by_mean else y


def layout_size(rows: int, segments: int, inputs: int) -> int:
    """Bytes of the layout of (rows, segments, inputs) signs: about one bit each."""
    return _native.binary_linear_size(rows, segments, inputs)


def pack(positive: Tensor) -> Tensor:
    """(rows, segments, inputs), true where a weight is +1 -> the layout of binary_linear.hpp, uint8 (blocks, bytes).

    A linear layer has one segment, a convolution one for each tap.
    """
    if positive.dtype != torch.bool or positive.ndim != 3 or positive.device.type != "cpu":
        found = f"{positive.dtype} {tuple(positive.shape)} on {positive.device}"
        raise UserError(f"the signs are {found}; give bool (rows, segments, inputs) on the CPU")
    rows, segments, inputs = positive.shape
    codes = torch.empty(layout_size(rows, segments, inputs), dtype=torch.uint8)
    positive = positive.contiguous()
    _native.binary_linear_pack(positive.data_ptr(), codes.data_ptr(), rows, segments, inputs)
    return codes.view(-(-rows // 16), -1) if rows else codes.view(0, 0)


def unpack(codes: Tensor, rows: int, segments: int, inputs: int) -> Tensor:
    """The inverse of `pack`: +1 and -1, float32 (rows, segments, inputs)."""
    check_codes(codes, rows, segments, inputs)
    signs = torch.empty(rows, segments, inputs)
    _native.binary_linear_unpack(codes.data_ptr(), signs.data_ptr(), rows, segments, inputs)
    return signs


def binary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, shift: Tensor | None = None, by_mean: bool = False
) -> Tensor:
    """x (M, K) float32, codes of `pack`, scale (N,), levels (1..3,), shift (K,) or None -> y (M, N), float32.

    Raises UserError when types or sizes do not fit.
    """
    return torch.ops.lilliput.binary_linear(x, codes, scale, levels, shift, by_mean)


def binary_weight_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (M, K) float32, codes of `pack` and scale (N,) -> y (M, N), float32."""
    return torch.ops.lilliput.binary_weight_linear(x, codes, scale)


def _binary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, shift: Tensor | None, by_mean: bool
) -> Tensor:
    _check_tokens(x)
    tokens, inputs = x.shape
    check_codes(codes, scale.numel(), 1, inputs)
    check_grid(scale, levels, shift, inputs)
    x, y = x.contiguous(), torch.empty(tokens, scale.numel())
    scale, levels, shift_at = scale.contiguous(), levels.contiguous(), 0 if shift is None else shift.data_ptr()
    weights = codes.data_ptr(), scale.data_ptr()
    how = levels.data_ptr(), levels.numel(), shift_at, by_mean
    sizes = tokens, scale.numel(), inputs, torch.get_num_threads()
    _native.binary_linear(x.data_ptr(), *weights, *how, y.data_ptr(), *sizes)
    return y


def _binary_weight_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    _check_tokens(x)
    tokens, inputs = x.shape
    check_codes(codes, scale.numel(), 1, inputs)
    check_vector("scale", scale, scale.numel())
    x, scale, y = x.contiguous(), scale.contiguous(), torch.empty(tokens, scale.numel())
    sizes = tokens, scale.numel(), inputs, torch.get_num_threads()
    _native.binary_weight_linear(x.data_ptr(), codes.data_ptr(), scale.data_ptr(), y.data_ptr(), *sizes)
    return y


def _check_tokens(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 2:
        raise UserError(
            f"x is {x.dtype} with shape {tuple(x.shape)}; a binary product takes (tokens, inputs) in float32"
        )


def check_codes(codes: Tensor, rows: int, segments: int, inputs: int) -> None:
    """Raises UserError unless `codes` are the layout of (rows, segments, inputs) signs."""
    if not (0 <= rows < MOST_INPUTS and 0 <= segments < MOST_INPUTS and 0 <= inputs < MOST_INPUTS):
        raise UserError(f"signs of {rows} x {segments} x {inputs} are out of range; each must be below {MOST_INPUTS}")
    if segments * inputs >= MOST_INPUTS:
        raise UserError(f"a row of {segments * inputs} signs is too long; give fewer than {MOST_INPUTS}")
    if codes.device.type != "cpu" or codes.dtype != torch.uint8 or not codes.is_contiguous():
        raise UserError(f"codes are {codes.dtype} on {codes.device}; the layout is contiguous uint8 on the CPU")
    size = layout_size(rows, segments, inputs)
    if codes.numel() != size:
        raise UserError(f"{codes.numel()} bytes are not the layout of {rows} x {segments} x {inputs} signs: {size}")


def check_grid(scale: Tensor, levels: Tensor, shift: Tensor | None, inputs: int) -> None:
    """Raises UserError unless scale, levels and shift are float32 vectors of the right lengths."""
    check_vector("scale", scale, scale.numel())
    if not 1 <= levels.numel() <= PLANES:
        raise UserError(f"there are {levels.numel()} levels of activations; give 1 to {PLANES}")
    check_vector("levels", levels, levels.numel())
    if shift is not None:
        check_vector("shift", shift, inputs)
        if not shift.is_contiguous():
            raise UserError("the shift is strided; give a contiguous one")


def check_vector(name: str, values: Tensor, length: int) -> None:
    """Raises UserError unless `values` is a float32 vector of this length on the CPU."""
    if values.dtype != torch.float32 or values.shape != (length,) or values.device.type != "cpu":
        found = f"{values.dtype} {tuple(values.shape)} on {values.device}"
        raise UserError(f"{name} is {found}; give float32 ({length},) on the CPU")


def _fake(x: Tensor, codes: Tensor, scale: Tensor, *how) -> Tensor:
    _check_tokens(x)
    return x.new_empty(x.shape[0], scale.shape[0])


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define(
    "binary_linear(Tensor x, Tensor codes, Tensor scale, Tensor levels, Tensor? shift, bool by_mean) -> Tensor"
)
_library.define("binary_weight_linear(Tensor x, Tensor codes, Tensor scale) -> Tensor")
_library.impl("binary_linear", _binary_linear, "CPU")
_library.impl("binary_weight_linear", _binary_weight_linear, "CPU")
torch.library.register_fake("lilliput::binary_linear", _fake, lib=_library)
torch.library.register_fake("lilliput::binary_weight_linear", _fake, lib=_library)
isa()  # a wrong LILLIPUT_ISA is said at once
