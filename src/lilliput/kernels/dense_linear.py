"""y = x W^T with W (N, K) in float32 or bfloat16, for few tokens: the weights are read once; sums are float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native, isa


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.linear(x, weight.to(x.dtype))


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) float32, weight (N, K) float32 or bfloat16 -> y (M, N) float32. Raises UserError."""
    return torch.ops.lilliput.dense_linear(x, weight)


def _dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    x, y = x.contiguous(), torch.empty(len(x), len(weight))
    (rows, columns), half = weight.shape, weight.dtype == torch.bfloat16
    addresses = x.data_ptr(), len(x), y.data_ptr()
    _native.dense_linear(weight.data_ptr(), rows, columns, half, *addresses, torch.get_num_threads())
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 2:
        raise UserError(f"x is {x.dtype} with shape {tuple(x.shape)}; dense_linear takes (tokens, inputs) in float32")
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise UserError(f"the weight is {weight.dtype}; dense_linear takes it contiguous, in float32 or bfloat16")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise UserError(f"a weight of the shape {tuple(weight.shape)} does not fit x of the shape {tuple(x.shape)}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return x.new_empty(x.shape[0], weight.shape[0])


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define("dense_linear(Tensor x, Tensor weight) -> Tensor")
_library.impl("dense_linear", _dense_linear, "CPU")
torch.library.register_fake("lilliput::dense_linear", _fake, lib=_library)
isa()  # a wrong LILLIPUT_ISA is said at once
