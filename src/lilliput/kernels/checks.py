"""What the operators ask of their tensors before an address is handed to C++."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.errors import UserError


def check_input(x: Tensor, operation: str) -> None:
    """Raises UserError unless x is (tokens, inputs) in float32."""
    if x.dtype != torch.float32 or x.ndim != 2:
        raise UserError(f"x is {x.dtype} with shape {tuple(x.shape)}; {operation} takes (tokens, inputs) in float32")


def check_packed(
    codes: Tensor,
    grid: Tensor,
    layout_sizes: Callable[[int, int, int, int], tuple[int, int]],
    rows: int,
    columns: int,
    group: int,
    bits: int,
) -> None:
    """Raises UserError unless codes and grid are the layout of (rows, columns) whose sizes `layout_sizes` gives."""
    if group < 1 or columns % group or rows < 0:
        raise UserError(f"group {group} does not divide {columns} inputs, or {rows} rows are too few")
    if codes.device.type != "cpu" or grid.device.type != "cpu":
        raise UserError(f"the layout is on {codes.device} and {grid.device}; the kernels run on the CPU")
    if codes.dtype != torch.uint8 or grid.dtype != torch.int16:
        raise UserError(f"codes are {codes.dtype} and the grid {grid.dtype}; the layout has uint8 and int16")
    sizes = layout_sizes(rows, columns, group, bits)
    if (codes.numel(), grid.numel()) != sizes or not (codes.is_contiguous() and grid.is_contiguous()):
        found = f"{codes.numel()} bytes of codes and {grid.numel()} of grid"
        raise UserError(f"{found} are not the layout of {rows} x {columns} at {bits} bits; it has {sizes}")
