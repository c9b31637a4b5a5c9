"""A linear layer whose weights stand row by row, one row for each output or one for each input.

Rows of inputs let a product skip the inputs that are zero (`lilliput.kernels.sparse_ffn`).
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels import sparse_ffn as kernel
from lilliput.kernels.dense_linear import dense_linear
from lilliput.methods.quantize._grid import choose_grid, round_to_grid

FORMATS = ("float32", "bfloat16", "int8", "int4")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
BY = ("outputs", "inputs")
SEARCH = 10  # smaller ranges tried for each group of 4-bit codes


class RowLinear(nn.Module):
    """y = x W^T + b with W stored by its outputs (out, in) or transposed, by its inputs (in, out), in one of FORMATS.

    By inputs only the rows of inputs that are not zero are read. 8 bits have one scale a row, 4 bits a scale and a zero
    for each `group` of a row.
    """

    values: Tensor
    grid: Tensor | None
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, by: str, format: str, group: int = 0, bias: bool = False):
        super().__init__()
        if by not in BY or format not in FORMATS:
            raise UserError(f"rows by {by!r} in {format!r}; choose {' or '.join(BY)} and one of {', '.join(FORMATS)}")
        self.in_features, self.out_features, self.by, self.format, self.group = (
            in_features,
            out_features,
            by,
            format,
            group,
        )
        rows, columns = self._shape()
        padded = -(-columns // kernel.CHUNK) * kernel.CHUNK
        width = {"int8": padded, "int4": padded // 2}.get(format, columns)
        if format == "int4" and (group < 1 or columns % group):
            raise UserError(f"group {group} does not divide the {columns} columns of a row")
        self.register_buffer("values", torch.zeros(rows, width, dtype=_TYPES[format]))
        grid = {"int8": (rows, 1, 1), "int4": (rows, columns // max(1, group), 2)}.get(format)
        self.register_buffer("grid", None if grid is None else torch.zeros(grid, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, by: str, format: str, group: int = 64) -> RowLinear:
        """The layer of weight (out, in) and bias (out,); `group` is the most that shares a grid in 4 bits."""
        stored = (weight if by == "outputs" else weight.T).detach().float().contiguous()
        group = fitting_group(group, stored.shape[1]) if format == "int4" else 0
        made = cls(weight.shape[1], weight.shape[0], by, format, group, bias is not None)
        if made.grid is None:
            made.values = stored.to(_TYPES[format])
        else:
            bits = 8 if format == "int8" else 4
            shared = stored.shape[1] if bits == 8 else group
            scale, zero = choose_grid(stored, bits, shared, symmetric=bits == 8, search=0 if bits == 8 else SEARCH)
            codes = round_to_grid(stored, scale, zero, bits) - 2 ** (bits - 1)
            made.values = kernel.pack_rows(codes, bits)
            made.grid = torch.stack([scale] if bits == 8 else [scale, zero], -1).bfloat16()
        if bias is not None:
            made.bias = bias.detach().float().clone()
        return made

    def _shape(self) -> tuple[int, int]:
        by_output = self.by == "outputs"
        return (self.out_features, self.in_features) if by_output else (self.in_features, self.out_features)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "by": self.by}
        return sizes | {"format": self.format, "group": self.group, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, by {self.by}, {self.format}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all rows and their grid."""
        return self.values.nbytes + (0 if self.grid is None else self.grid.nbytes)

    def rows(self) -> kernel.Rows:
        """The rows as the kernel takes them, also after the model was cast to another type of floats."""
        values = self.values if self.values.dtype in kernel.FORMATS else self.values.float()
        grid = None if self.grid is None else self.grid.bfloat16().contiguous()
        return kernel.Rows(values.contiguous(), grid, self._shape()[1])

    def float_bias(self) -> Tensor | None:
        """The bias in the type that the kernel takes."""
        return None if self.bias is None else self.bias.float()

    def dequantized(self) -> Tensor:
        """The weights that stand here, (out, in), float32."""
        dense = self.rows().dense()
        return dense if self.by == "outputs" else dense.T

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.plain(rows) if rows.requires_grad and torch.is_grad_enabled() else self.product(rows.float())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def plain(self, x: Tensor) -> Tensor:
        """The product in plain torch, through which gradients flow."""
        return F.linear(x.float(), self.dequantized(), self.float_bias())

    def product(self, x: Tensor) -> Tensor:
        """The product by a kernel, where there is one for the format: x (M, in) float32 -> (M, out)."""
        if self.by == "inputs":
            return kernel.sparse_linear(x, self.rows(), self.float_bias())
        if self.grid is not None:
            return self.plain(x)
        y = dense_linear(x, self.rows().values)
        return y if self.bias is None else y + self.bias.float()


def fitting_group(group: int, columns: int) -> int:
    """The largest group, at most the wished one, that divides a row into whole chunks; else the whole row."""
    found = gcd(group, columns)
    return found if found % kernel.CHUNK == 0 else columns
