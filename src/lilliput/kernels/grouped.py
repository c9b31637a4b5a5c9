"""What the products of weights in groups share: the executed layout in blocks of rows, its checks, and the operator.

`group_linear` and `lookup_linear` are two ways to execute the same stored format; each has native functions of its own,
`<name>`, `<name>_sizes`, `<name>_pack` and `<name>_unpack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels.checks import check_input, check_packed


class GroupedProduct:
    """The operator `torch.ops.lilliput.<name>` over a layout with `block` rows side by side, for some bit widths."""

    def __init__(self, name: str, bits: Sequence[int], block: int):
        self.name, self.bits, self.block = name, tuple(bits), block
        native: Any = _native
        self._sizes, self._pack, self._unpack, self._multiply = (
            getattr(native, f"{name}{part}") for part in ("_sizes", "_pack", "_unpack", "")
        )
        self._library = torch.library.Library("lilliput", "FRAGMENT")
        self._library.define(f"{name}(Tensor x, Tensor codes, Tensor grid, SymInt rows, int group, int bits) -> Tensor")
        self._library.impl(name, self._run, "CPU")
        torch.library.register_fake(f"lilliput::{name}", self._fake, lib=self._library)

    def layout_sizes(self, rows: int, columns: int, group: int, bits: int) -> tuple[int, int]:
        """Bytes of the codes and number of grid values of the executed layout."""
        return self._sizes(rows, columns, group, bits)

    def pack(
        self, stored: Tensor, scale: Tensor, zero: Tensor | None, columns: int, bits: int
    ) -> tuple[Tensor, Tensor]:
        """Stored codes (N, bytes) and grids (N, K / group) -> the executed layout (codes, grid), see the native header.

        The grid is int16, the bits of bfloat16 values, so that casts of a model leave it alone.
        """
        group = self._checked_group(stored, scale, zero, columns, bits)
        rows = len(scale)
        size, _ = self.layout_sizes(rows, columns, group, bits)
        codes, stored = torch.empty(size, dtype=torch.uint8), stored.contiguous()
        self._pack(stored.data_ptr(), codes.data_ptr(), rows, columns, group, bits)
        grids = torch.stack([scale] if zero is None else [scale, zero], -1).bfloat16()
        blocks = F.pad(grids, (0, 0, 0, 0, 0, -rows % self.block)).unflatten(0, (-1, self.block))
        by_block = blocks.permute(0, 2, 3, 1).contiguous().view(torch.int16)
        return codes.view(len(by_block), size // max(1, len(by_block))), by_block

    def unpack(self, codes: Tensor, grid: Tensor, rows: int, columns: int, group: int, bits: int) -> tuple[Tensor, ...]:
        """The inverse of `pack`: stored codes, scale and, unless bits is 8, zero."""
        self._check_layout(codes, grid, rows, columns, group, bits)
        stored = torch.empty(rows, stored_bytes(columns, bits), dtype=torch.int8 if bits == 8 else torch.uint8)
        self._unpack(codes.data_ptr(), stored.data_ptr(), rows, columns, group, bits)
        kinds = 1 if bits == 8 else 2
        blocks = grid.view(torch.bfloat16).view(-(-rows // self.block), columns // group, kinds, self.block)
        grids = blocks.permute(2, 0, 3, 1).flatten(1, 2)[:, :rows]
        return stored, *(part.contiguous() for part in grids)

    def _run(self, x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
        check_input(x, self.name)
        tokens, columns = x.shape
        self._check_layout(codes, grid, rows, columns, group, bits)
        x = x.contiguous()
        y = torch.empty(tokens, rows)
        addresses = x.data_ptr(), codes.data_ptr(), grid.data_ptr(), y.data_ptr()
        self._multiply(*addresses, tokens, rows, columns, group, bits, torch.get_num_threads())
        return y

    def _fake(self, x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
        check_input(x, self.name)
        return x.new_empty(x.shape[0], rows)

    def _check_bits(self, bits: int) -> None:
        if bits not in self.bits:
            *others, last = map(str, self.bits)
            raise UserError(f"bits is {bits}; choose {', '.join(others)} or {last} for {self.name}")

    def _check_layout(self, codes: Tensor, grid: Tensor, rows: int, columns: int, group: int, bits: int) -> None:
        self._check_bits(bits)
        check_packed(codes, grid, self.layout_sizes, rows, columns, group, bits)

    def _checked_group(self, stored: Tensor, scale: Tensor, zero: Tensor | None, columns: int, bits: int) -> int:
        """Inputs of a group. Raises UserError for stored codes and grids that do not fit each other."""
        self._check_bits(bits)
        if stored.device.type != "cpu" or scale.device.type != "cpu":
            raise UserError(f"the weights are on {stored.device}; the kernels run on the CPU, move the layer there")
        if scale.ndim != 2:
            raise UserError(f"the scale has the shape {tuple(scale.shape)}; it must be (rows, groups)")
        rows, groups = scale.shape
        group = max(1, columns // max(1, groups))
        expected = (rows, stored_bytes(columns, bits))
        if stored.element_size() != 1 or stored.shape != expected or groups * group != columns:
            raise UserError(f"codes are {stored.dtype} {tuple(stored.shape)}; {bits} bits need bytes {expected}")
        if (zero is None) != (bits == 8) or (zero is not None and zero.shape != scale.shape):
            raise UserError(f"{bits}-bit codes take {'no zero' if bits == 8 else 'a zero of the shape of the scale'}")
        return group


def stored_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of stored codes: 8 inputs take as many bytes as they have bits."""
    return columns if bits == 8 else -(-columns // 8) * bits
